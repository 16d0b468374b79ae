"""From a trained model to answers within a budget: calibration, risk control, and sessions that really skip."""

from dynanet.infer.anytime import anytime as anytime
from dynanet.infer.anytime import at_random as at_random
from dynanet.infer.budgeted import Outcome as Outcome
from dynanet.infer.budgeted import budgeted_batch as budgeted_batch
from dynanet.infer.budgeted import outcome as outcome
from dynanet.infer.calibrate import Frontier as Frontier
from dynanet.infer.calibrate import calibrate as calibrate
from dynanet.infer.choice import Choice as Choice
from dynanet.infer.inputs import check_input as check_input
from dynanet.infer.session import Session as Session
from dynanet.infer.table import Table as Table
from dynanet.infer.table import tabulate as tabulate
