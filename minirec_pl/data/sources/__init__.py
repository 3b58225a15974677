"""Where samples come from; each source is a class that a YAML file names by its class_path."""

from minirec_pl.data.sources.amazon import AmazonReviews2023
from minirec_pl.data.sources.assemble import Samples, Source
from minirec_pl.data.sources.atomic_files import AtomicFiles
from minirec_pl.data.sources.hub import HubDataset
from minirec_pl.data.sources.interactions import InteractionTable
from minirec_pl.data.sources.sequences import Sequences

__all__ = ["AmazonReviews2023", "AtomicFiles", "HubDataset", "InteractionTable", "Samples", "Sequences", "Source"]
