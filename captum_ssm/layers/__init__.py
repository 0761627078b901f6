"""The layers of a model that mix tokens: which they are, how one call becomes a chain, and whether the chain is exact.

* :mod:`~captum_ssm.layers.call`: one recorded call of a mixer;
* :mod:`~captum_ssm.layers.mixers`: which classes of layers are mixers, and the adapter of each;
* :mod:`~captum_ssm.layers.wires`, :mod:`~captum_ssm.layers.sources`: factors of the residual stream around a mixer, and
  earlier inputs that a mixer reads besides its own; declared by class where the model's graph cannot show them;
* :mod:`~captum_ssm.layers.adapters`: the adapters, one file a kernel. The modules that they share hold one idea each:
  :mod:`~captum_ssm.layers.activations`, :mod:`~captum_ssm.layers.norms`, :mod:`~captum_ssm.layers.rotary`,
  :mod:`~captum_ssm.layers.log_domain`, :mod:`~captum_ssm.layers.padding`, :mod:`~captum_ssm.layers.heads`,
  :mod:`~captum_ssm.layers.parameters`, :mod:`~captum_ssm.layers.token_shift`, :mod:`~captum_ssm.layers.bypass`,
  :mod:`~captum_ssm.layers.softmax_attention`, :mod:`~captum_ssm.layers.attention_masks`,
  :mod:`~captum_ssm.layers.eager_weights`,
  :mod:`~captum_ssm.layers.fla_factors`, :mod:`~captum_ssm.layers.initial_state`, and the chains of whole kernels,
  :mod:`~captum_ssm.layers.selective_scan`, :mod:`~captum_ssm.layers.state_space_duality`,
  :mod:`~captum_ssm.layers.delta_rule`, :mod:`~captum_ssm.layers.averages`, :mod:`~captum_ssm.layers.matrix_memory`,
  :mod:`~captum_ssm.layers.complex_states`, :mod:`~captum_ssm.layers.real_gated`;
* :mod:`~captum_ssm.layers.stand_ins`, :mod:`~captum_ssm.layers.measured`: parts of a layer that stand in for plain
  weights (adapters of fine-tuning, quantised weights, hooks), and what such a part does;
* :mod:`~captum_ssm.layers.fidelity`: decompose a call, and compare the chain with the layer's own output;
* :mod:`~captum_ssm.layers.placement`: a layer with the tensors that are elsewhere between its runs;
* :mod:`~captum_ssm.layers.precision`: the types that code computes in, and autocast;
* :mod:`~captum_ssm.layers.release`: the release of transformers that a layer is from, for errors;
* :mod:`~captum_ssm.layers.shallow_copy`: a copy of a module that shares all that it holds;
* :mod:`~captum_ssm.layers.isolated`: run a copy of a layer without touching the layer.
"""
