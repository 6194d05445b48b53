"""Augmentation of the discriminator's input images: the ADA pipeline with its stages, and DiffAugment."""
