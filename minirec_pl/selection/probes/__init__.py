"""How signals are taken from a policy or from any LightningModule."""

from minirec_pl.selection.probes.head import HeadProbe
from minirec_pl.selection.probes.target import TargetSignals, target_signals

__all__ = ["HeadProbe", "TargetSignals", "target_signals"]
