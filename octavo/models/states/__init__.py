"""Layers that keep a state of fixed size beside K and V, or in their place: recurrences and short convolutions.

transformers gives all of them one interface: a mixer asks the cache that it is called with for its states and hands
back new ones. They are found by a run with a cache that notes who asks (find.py), they compute packed steps with states
from a pool (mixers.py), and before a model is served every one of them has shown that it does so exactly (proof.py).
Nothing here knows an architecture.
"""

from octavo.models.states.find import STATELESS, TYPES, Found, find, install, may_keep_states, uninstall
from octavo.models.states.mixers import Mixer, StateStep, native_mixers, stepping
from octavo.models.states.proof import TOKENS, prove

__all__ = [
    "STATELESS", "TOKENS", "TYPES", "Found", "Mixer", "StateStep", "find", "install", "may_keep_states",
    "native_mixers", "prove", "stepping", "uninstall",
]  # fmt: skip
