"""The changes that adapters make to the weights of networks."""

from peft.tuners.lora import LoraLayer


def differences(networks, adapter="default"):
    """Matrices that peft adds, by network and module, of the modules that have the adapter."""
    return {
        (name, key): module.get_delta_weight(adapter).detach()
        for name, network in networks.items()
        for key, module in network.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }
