"""Relevance that adds up: a value and its reference, followed through every function of a model.

* :mod:`~captum_ssm.relevance.functions`: the table of functions, one row for each, and the rules that users register;
* :mod:`~captum_ssm.relevance.traced`: tensors that carry a reference and send each function of them to a rule;
* :mod:`~captum_ssm.relevance.call`: one such function with its arguments and its row;
* :mod:`~captum_ssm.relevance.rule`: the dispatch from a call to the method for its kind;
* :mod:`~captum_ssm.relevance.difference`, :mod:`~captum_ssm.relevance.frozen`: the two rules, a method for each kind;
* :mod:`~captum_ssm.relevance.slopes`, :mod:`~captum_ssm.relevance.difference_quotient`: multipliers of elementwise
  functions;
* :mod:`~captum_ssm.relevance.recurrence`: the rules of a recurrence, in linear time;
  :mod:`~captum_ssm.relevance.averages`, :mod:`~captum_ssm.relevance.exponentials`: those of exponentials over their
  sum, for a value and a reference of any two levels; :mod:`~captum_ssm.relevance.attention`: those of softmax
  attention, in linear memory;
* :mod:`~captum_ssm.relevance.follow`: a model run on traced tensors, its mixers by their decomposition;
  :mod:`~captum_ssm.relevance.external_code`: rules that run instead of named code;
  :mod:`~captum_ssm.relevance.called_code`: where a model finds the functions that it calls;
  :mod:`~captum_ssm.relevance.kernels`: the rules of the packages' kernels;
  :mod:`~captum_ssm.relevance.checkpoints`: blocks run again for the gradient;
  :mod:`~captum_ssm.relevance.own_outputs`, :mod:`~captum_ssm.relevance.own_projections`: what the mixers' own code,
  which checks them, has computed already;
  :mod:`~captum_ssm.relevance.quantised`: the rule of parts with quantised weights;
* :mod:`~captum_ssm.relevance.run`: one explanation, forward, backward, and the sum that must come out.
"""
