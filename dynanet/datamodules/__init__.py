"""Data modules: one class per data set, which opens its splits and says what the inputs and the task are.

    data = dynanet.datamodules.DigitsDataModule(batch=64)
    model = dynanet.zoo.staged_resnet(**data.arguments)
    dynanet.train.fit(model, data.train, data.held_out, ...)

`DATA_MODULES` are those that the command line opens by name: a new one is a file here and a line in this table.
"""

from dynanet.datamodules.camvid import CamVidDataModule
from dynanet.datamodules.digits import DigitsDataModule
from dynanet.datamodules.folder import FolderDataModule
from dynanet.datamodules.indian_pines import IndianPinesDataModule
from dynanet.datamodules.inputs import ImageInputs, InputForm, SentenceInputs, SequenceInputs
from dynanet.datamodules.module import DataModule, Opened
from dynanet.datamodules.parquet import ParquetDataModule
from dynanet.datamodules.sentences import SentencesDataModule
from dynanet.datamodules.spoken_digits import SpokenDigitsDataModule
from dynanet.datamodules.time_series import TimeSeriesDataModule
from dynanet.datamodules.voc import VOCDataModule

DATA_MODULES: dict[str, type[DataModule]] = {
    "indian_pines": IndianPinesDataModule,
    "parquet": ParquetDataModule,
    "folder": FolderDataModule,
    "digits": DigitsDataModule,
    "camvid": CamVidDataModule,
    "voc": VOCDataModule,
    "spoken_digits": SpokenDigitsDataModule,
    "time_series": TimeSeriesDataModule,
    "sentences": SentencesDataModule,
}

__all__ = [
    "DATA_MODULES",
    "CamVidDataModule",
    "DataModule",
    "DigitsDataModule",
    "FolderDataModule",
    "ImageInputs",
    "IndianPinesDataModule",
    "InputForm",
    "Opened",
    "ParquetDataModule",
    "SentenceInputs",
    "SentencesDataModule",
    "SequenceInputs",
    "SpokenDigitsDataModule",
    "TimeSeriesDataModule",
    "VOCDataModule",
]
