"""The engines that train a pipeline stage, behind one interface: DeepSpeed and megatron-core."""
