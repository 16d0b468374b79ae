"""Tasks: how a network is trained for classification, segmentation or detection, and how its answers are scored."""

from dynanet.tasks.classification import Classification as Classification
from dynanet.tasks.detection.task import Detection as Detection
from dynanet.tasks.segmentation import PixelCrossEntropy as PixelCrossEntropy
from dynanet.tasks.segmentation import Segmentation as Segmentation
from dynanet.tasks.task import Overlay as Overlay
from dynanet.tasks.task import Score as Score
from dynanet.tasks.task import Task as Task
from dynanet.tasks.task import TrainingOptions as TrainingOptions
