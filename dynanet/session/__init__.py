"""Sessions: run a model sparsely, on the fastest engine for each static part."""

from dynanet.session.inputs import check_input as check_input
from dynanet.session.session import Session as Session
from dynanet.session.stream import EndOfSequence as EndOfSequence
from dynanet.session.stream import SequenceAnswer as SequenceAnswer
from dynanet.session.stream import SequenceFrame as SequenceFrame
