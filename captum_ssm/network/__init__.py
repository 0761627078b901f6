"""The model around its token mixers: how it is run, recorded and examined.

* :mod:`~captum_ssm.network.interface`: recognise a model by its interface;
* :mod:`~captum_ssm.network.hosts`: wrappers of other libraries around a model;
* :mod:`~captum_ssm.network.inputs`: check inputs, targets and the model's state;
* :mod:`~captum_ssm.network.forward`: run the model, and take the explained output;
* :mod:`~captum_ssm.network.recording`: record the calls of all mixers in one run;
* :mod:`~captum_ssm.network.examination`: measure that nothing but the mixers mixes tokens, and which calls read which;
* :mod:`~captum_ssm.network.held_run`: the run that is measured, its mixers' outputs held fixed;
* :mod:`~captum_ssm.network.token_identity`: measure which token of the inputs each token of each call is;
* :mod:`~captum_ssm.network.other_ids`: measure what token ids change, by other ids;
* :mod:`~captum_ssm.network.hidden_paths`: find what passes between tokens where no gradient does, by other values;
* :mod:`~captum_ssm.network.token_codes`: which token reads which, from few observations;
* :mod:`~captum_ssm.network.measurements`: measurements of a model, kept while nothing changes that they depend on;
* :mod:`~captum_ssm.network.graph`: the result of an examination, the residual graph;
* :mod:`~captum_ssm.network.patches`: measure which pixels each token reads;
* :mod:`~captum_ssm.network.reference`: the input that relevance compares with;
* :mod:`~captum_ssm.network.turns`: leave the model as it was, also beside other threads;
* :mod:`~captum_ssm.network.state`: what a model writes on itself, and its restoring;
* :mod:`~captum_ssm.network.copies`: copies of layers that keep states on themselves;
* :mod:`~captum_ssm.network.eager`: run the Python code of a compiled model, and checkpointed code once;
* :mod:`~captum_ssm.network.gathered`: gather the parameters that several processes share;
* :mod:`~captum_ssm.network.threads`: hooks and substitutes that act in the thread that set them alone;
* :mod:`~captum_ssm.network.quantised`: the gradient of parts with quantised weights;
* :mod:`~captum_ssm.network.continuation`: the text that a language model writes after a prompt;
* :mod:`~captum_ssm.network.reference_kernels`: run the model on torch code instead of an installed kernel.
"""
