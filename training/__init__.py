"""Training: Lightning's Trainer, losses, augmentation, teachers."""
