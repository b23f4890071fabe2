"""Which examples the property tests try: the same ones in every run, or, to explore, ten times as many new ones."""

from __future__ import annotations

import os

from hypothesis import settings
from hypothesis.internal.conjecture.providers import HypothesisProvider
from hypothesis.internal.constants_ast import Constants

settings.register_profile("same", settings.get_profile("ci"))
settings.register_profile("explore", settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

if settings().derandomize:
    # Hypothesis also tries constants of those of our modules that happen to be imported: they depend on the tests before.
    HypothesisProvider._local_constants = Constants()


def examples(count: int) -> settings:
    """Settings of a property test that tries `count` examples, or ten times as many to explore."""
    return settings(max_examples=count * settings().max_examples // 100)
