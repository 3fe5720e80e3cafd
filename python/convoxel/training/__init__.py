"""Training on folders of scans: what the network sees, what it learns from, and what is kept (docs/train.md).

cases        datasets of nnU-Net and the Medical Segmentation Decathlon, and their folds
fingerprint  what their scans are like: sizes, spacings, intensities, labels
plan         spacing, network, patch and batch from that and from the machine (grid, topology, budget, cost)
cache        scans made ready, on disk, memory-mapped
patches      which part of which scan is the next one
augment      one patch made into endless ones
feed         batches, prepared in the background
loss         what the network learns from
"""
