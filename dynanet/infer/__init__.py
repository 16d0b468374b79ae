"""From a trained model to answers within a budget: calibration, risk control, and sessions that really skip."""

from dynanet.infer.anytime import anytime as anytime
from dynanet.infer.anytime import at_random as at_random
from dynanet.infer.budgeted import Outcome as Outcome
from dynanet.infer.budgeted import budgeted_batch as budgeted_batch
from dynanet.infer.budgeted import outcome as outcome
from dynanet.infer.calibrate import Frontier as Frontier
from dynanet.infer.calibrate import calibrate as calibrate
from dynanet.infer.calibrate import paying as paying
from dynanet.infer.calibrate import with_exits as with_exits
from dynanet.infer.choice import Choice as Choice
from dynanet.infer.inputs import check_input as check_input
from dynanet.infer.scheduler import cost_weight as cost_weight
from dynanet.infer.scheduler import fit_gates as fit_gates
from dynanet.infer.scheduler import fit_scores as fit_scores
from dynanet.infer.scheduler import learned as learned
from dynanet.infer.scheduler import rescored as rescored
from dynanet.infer.scheduler import schedule as schedule
from dynanet.infer.session import Session as Session
from dynanet.infer.stream import Answered as Answered
from dynanet.infer.stream import EndOf as EndOf
from dynanet.infer.stream import FrameOf as FrameOf
from dynanet.infer.table import Table as Table
from dynanet.infer.table import tabulate as tabulate
