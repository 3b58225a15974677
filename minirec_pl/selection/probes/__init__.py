"""How signals are taken from any LightningModule, and the gradients behind them."""

from minirec_pl.selection.probes.head import HeadProbe

__all__ = ["HeadProbe"]
