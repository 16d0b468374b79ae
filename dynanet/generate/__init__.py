"""Text generation: early exits per token, and self-speculative decoding."""

from dynanet.generate.exits import CopyState as CopyState
from dynanet.generate.exits import ExitRule as ExitRule
from dynanet.generate.exits import Generated as Generated
from dynanet.generate.exits import Recompute as Recompute
from dynanet.generate.exits import certify as certify
from dynanet.generate.exits import generate as generate
from dynanet.generate.speculative import Speculated as Speculated
from dynanet.generate.speculative import speculate as speculate
from dynanet.generate.token_confidence import LearnedToken as LearnedToken
from dynanet.generate.token_confidence import Saturation as Saturation
from dynanet.generate.token_confidence import SoftmaxGap as SoftmaxGap
from dynanet.generate.token_confidence import TokenConfidence as TokenConfidence
from dynanet.generate.token_confidence import consistency_loss as consistency_loss
