"""Records what a trainer draws."""

from __future__ import annotations


def recorded_samples(monkeypatch, trainer_class):
    """The (pictures, labels, random source) of every call of the class-conditional trainer's sample(), as they come."""
    drawn, original = [], trainer_class.sample

    def recording(self, requests, rng):
        found = original(self, requests, rng)
        drawn.append((found["samples"], [request["label"] for request in requests], rng))
        return found

    monkeypatch.setattr(trainer_class, "sample", recording)
    return drawn
