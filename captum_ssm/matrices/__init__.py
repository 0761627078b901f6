"""Token matrices, the only code that makes (L, L) matrices of recurrences, and the rollout that multiplies them.

* :mod:`~captum_ssm.matrices.split_layer`: a decomposed layer, split into output side, core and input side;
* :mod:`~captum_ssm.matrices.layer_stack`: all layers of one run of a model, split one by one;
* :mod:`~captum_ssm.matrices.core_matrix`: the matrix of a core, from its products or entry by entry;
* :mod:`~captum_ssm.matrices.banded`, :mod:`~captum_ssm.matrices.shared_heads`,
  :mod:`~captum_ssm.matrices.single_channels`: cores whose entries have a short form;
* :mod:`~captum_ssm.matrices.lengths`: the lengths of what a layer writes;
* :mod:`~captum_ssm.matrices.entries`: a walk through the entries of a core in blocks of bounded size;
* :mod:`~captum_ssm.matrices.token_matrix`: token matrices, their sums and products;
* :mod:`~captum_ssm.matrices.fusion`: how the matrices of a layer's channels become one;
* :mod:`~captum_ssm.matrices.rollout`: from the matrices of all layers to one score for each token.
"""
