"""The interface to several devices."""


class Devices:
    """One device. Backends that support several override it.

    Replicas run the same code on parts of a batch. On PyTorch, processes may share experts. On JAX,
    arrays may be spread over a mesh, as by `keras.distribution`.
    """

    def num_replicas(self):
        return 1

    def sum_over_replicas(self, values):
        return values

    def gather_over_replicas(self, values):
        """The rows (R, ...) of all replicas, one after the other."""
        return values

    def sum_of_counts(self, values):
        """Amounts to add to counters: summed over replicas, unless reading a counter sums them."""
        return values

    def separate_losses(self, layer):
        """Give each replica its own list of the losses that a layer adds."""

    def expert_processes(self):
        """The `torch_experts.ExpertParallel` that is set; None if each process has all experts."""
        return None

    def split_experts(self, experts, data, process_group):
        """An `ExpertParallel` for `keras.distribution.set_distribution`."""
        raise NotImplementedError

    def token_shards(self):
        """How the tokens of a batch are spread, a `jax_sharding.Shards`; None on one device."""
        return None
