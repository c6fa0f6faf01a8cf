"""The interface to several devices."""


class Devices:
    """Operations across devices, here for a single device.

    Replicas run the same code on parts of a batch. On PyTorch, processes may share experts. On JAX,
    `keras.distribution` may shard arrays over a mesh.
    """

    def num_replicas(self):
        return 1

    def sum_over_replicas(self, values):
        return values

    def gather_over_replicas(self, values):
        """Concatenate the rows (R, ...) of all replicas."""
        return values

    def sum_of_counts(self, values):
        """Sum increments of counters over replicas, unless reading a counter does so."""
        return values

    def separate_losses(self, layer):
        """Give each replica its own list of the losses that a layer adds."""

    def expert_processes(self):
        """Return the current `torch_experts.ExpertParallel`; None if experts are not split."""
        return None

    def split_experts(self, experts, data, process_group):
        """Return an `ExpertParallel` for `keras.distribution.set_distribution`."""
        raise NotImplementedError

    def token_shards(self):
        """Return the `jax_sharding.Shards` of a batch of tokens; None on one device."""
        return None
