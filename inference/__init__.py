"""From a checkpoint and audio of any length to scores, events and embeddings."""

from inference.tagger import Tagged as Tagged
from inference.tagger import Tagger as Tagger
