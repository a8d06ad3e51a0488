"""DREG in the training loops of other libraries, each imported only when its module here is.

* :mod:`chainzrule_kernels.integrations.lightning`: a callback for Lightning
* :mod:`chainzrule_kernels.integrations.transformers`: a callback for the Trainer of Hugging Face
"""
