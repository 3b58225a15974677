"""A callback that notes what a fit did at each step."""

from lightning.pytorch import Callback


class Watch(Callback):
    """Notes gradients, batches, outputs and logged figures of each step."""

    def __init__(self):
        self.gradients, self.batches, self.outputs, self.logged = [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append([p.grad.clone() for p in pl_module.policy.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)
        self.outputs.append(outputs)
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def fit(make_trainer, module, data, steps, **options):
    """Trains for some optimizer steps and returns the notes."""
    watch = Watch()
    trainer = make_trainer(max_epochs=-1, max_steps=steps, log_every_n_steps=1, callbacks=[watch], **options)
    trainer.fit(module, data)
    return watch
