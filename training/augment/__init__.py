"""Augmentation of the images that D sees: ADA's pipe and its stages, and DiffAugment."""
