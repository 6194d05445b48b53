"""Sources of images: files, archives, published datasets, arrays, drawn scenes. This package does not import torch."""
