import math

import pytest

from dynanet.core.errors import ConfigError, check_shares


def test_shares_are_from_0_to_1():
    check_shares(first=0, second=1.0, third=0.5)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="second must be a share between 0 and 1"):
            check_shares(first=0.5, second=wrong)


def test_positive_shares_are_above_0():
    check_shares(positive=True, share=1e-9)
    with pytest.raises(ConfigError, match="share must be a share above 0 and at most 1, got 0"):
        check_shares(positive=True, share=0)
