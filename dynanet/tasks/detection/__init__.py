"""Object detection: the training loss, decoding boxes, and COCO average precision."""

from dynanet.tasks.detection.decoding import Detections as Detections
from dynanet.tasks.detection.decoding import decode as decode
from dynanet.tasks.detection.loss import DetectionLoss as DetectionLoss
from dynanet.tasks.detection.precision import Precision as Precision
from dynanet.tasks.detection.precision import average_precision as average_precision
