"""The data modules that the command line and `dynanet.experiment.Data` open by name, one line each."""

from dynanet.datamodules.camvid import CamVidDataModule
from dynanet.datamodules.digits import DigitsDataModule
from dynanet.datamodules.folder import FolderDataModule
from dynanet.datamodules.indian_pines import IndianPinesDataModule
from dynanet.datamodules.module import DataModule
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
