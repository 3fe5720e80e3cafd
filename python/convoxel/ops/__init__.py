"""torch operators `torch.ops.convoxel.*`."""
