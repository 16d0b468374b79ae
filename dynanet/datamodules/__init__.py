"""Data modules: one class per data set, which opens its splits and says what the inputs and the task are.

    data = dynanet.datamodules.DigitsDataModule(batch=64)
    model = dynanet.zoo.staged_resnet(**data.arguments)
    dynanet.train.fit(model, data.train, data.held_out, ...)

`DATA_MODULES` holds those that the command line opens by name: a new one is a file here and a line of `table.py`.
"""

from dynanet.datamodules.camvid import CamVidDataModule as CamVidDataModule
from dynanet.datamodules.digits import DigitsDataModule as DigitsDataModule
from dynanet.datamodules.folder import FolderDataModule as FolderDataModule
from dynanet.datamodules.indian_pines import IndianPinesDataModule as IndianPinesDataModule
from dynanet.datamodules.inputs import ImageInputs as ImageInputs
from dynanet.datamodules.inputs import InputForm as InputForm
from dynanet.datamodules.inputs import SentenceInputs as SentenceInputs
from dynanet.datamodules.inputs import SequenceInputs as SequenceInputs
from dynanet.datamodules.module import DataModule as DataModule
from dynanet.datamodules.module import Opened as Opened
from dynanet.datamodules.parquet import ParquetDataModule as ParquetDataModule
from dynanet.datamodules.sentences import SentencesDataModule as SentencesDataModule
from dynanet.datamodules.spoken_digits import SpokenDigitsDataModule as SpokenDigitsDataModule
from dynanet.datamodules.table import DATA_MODULES as DATA_MODULES
from dynanet.datamodules.time_series import TimeSeriesDataModule as TimeSeriesDataModule
from dynanet.datamodules.voc import VOCDataModule as VOCDataModule
