"""Settings in upstream's words: the environment, ProxyConfig and mesh file of its node proxy
(facts ztunnel 14), so that ours starts in its place."""

from agent.dropin.translate import Given, Translated, translate

__all__ = ["Given", "Translated", "translate"]
