"""Calibration: from a trained model and held-out data to thresholds for a budget or a promised risk."""

from dynanet.calibrate.anytime import anytime_curve as anytime_curve
from dynanet.calibrate.anytime import random_exits as random_exits
from dynanet.calibrate.budgeted import Outcome as Outcome
from dynanet.calibrate.budgeted import budgeted_batch as budgeted_batch
from dynanet.calibrate.budgeted import outcome as outcome
from dynanet.calibrate.frontier import Frontier as Frontier
from dynanet.calibrate.frontier import calibrate as calibrate
from dynanet.calibrate.frontier import select_exits as select_exits
from dynanet.calibrate.frontier import with_exits as with_exits
from dynanet.calibrate.learned_exits import cost_weight as cost_weight
from dynanet.calibrate.learned_exits import fit_gates as fit_gates
from dynanet.calibrate.learned_exits import fit_scores as fit_scores
from dynanet.calibrate.learned_exits import rescore as rescore
from dynanet.calibrate.learned_exits import schedule as schedule
from dynanet.calibrate.learned_exits import with_learned_confidence as with_learned_confidence
from dynanet.calibrate.operating_point import OperatingPoint as OperatingPoint
from dynanet.calibrate.table import ExitTable as ExitTable
from dynanet.calibrate.table import tabulate as tabulate
