"""Speed, measured in pairs: what a session is worth against the same weights run without skipping."""

from dynanet.bench.comparison import Row as Row
from dynanet.bench.comparison import compare as compare
from dynanet.bench.granularity import TileTimes as TileTimes
from dynanet.bench.granularity import tile_times as tile_times
from dynanet.bench.machine import append_rows as append_rows
from dynanet.bench.machine import facts as facts
from dynanet.bench.timing import paired as paired
