"""Configurations of other trainers, turned into ours: tables of their options, and the rules between these."""
