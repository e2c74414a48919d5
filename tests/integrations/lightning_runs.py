"""A module for Lightning that trains the small BERT."""

import lightning.pytorch as lightning
import torch
from bert_runs import lora
from torch import nn


def lightning_module(*, manual):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = lora()
            self.automatic_optimization = not manual

        def training_step(self, batch, index):
            # Data and dropout hang on the step alone: Lightning does not find its place within an epoch again.
            torch.manual_seed(self.global_step)
            inputs = torch.randint(0, 100, (4, 10))
            labels = (inputs[:, 0] > 50).long()
            outputs = self.model(input_ids=inputs, labels=labels)
            loss = outputs.loss
            self.task_loss = float(nn.functional.cross_entropy(outputs.logits, labels))
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3)

    return Module()
