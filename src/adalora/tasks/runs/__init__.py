"""A recipe carried out: model, Trainer, folder, what is shown, and what comes after."""
