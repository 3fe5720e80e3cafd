"""Training on folders of scans: what the network sees, what it learns from, and what is kept (docs/train.md).

settings     what a user may choose
cases        datasets of nnU-Net and the Medical Segmentation Decathlon, and their folds
fingerprint  what their scans are like: sizes, spacings, intensities, labels
plan         spacing, network, patch and batch from that and from the machine (grid, topology, budget, cost)
cache        scans made ready, on disk, memory-mapped
patches      which part of which scan is the next one
augment      one patch made into endless ones; intensities what scanners do
feed         batches, prepared in the background
structures   labels or regions: what the network's outputs mean
loss         Dice and cross-entropy
loop         the steps, from any step on; processes those that share them
state        what a run goes on from
logs         log, curve, TensorBoard; pictures of predictions
run          a run in its folder
commands     `convoxel train`
"""
