"""The Laplace approximation: a normal posterior of the parameters, from the curvature where training ended."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike

from .._estimators import Eigendecomposition, wide
from .._layers import any_parameters_of, trainable
from .._math import linalg
from .._math.arguments import single_key
from .._math.scalars import positive, scalar
from .._math.tree import dot
from .._math.types import Model, Parameters, PRNGKey, Scalar, Where
from .predictive import Predictive


class Laplace(eqx.Module):
    r"""A normal posterior of the parameters of a trained model.

    $$\theta \sim \mathcal N\big(\theta_*, \Sigma\big), \qquad
    \Sigma^{-1} = \tfrac{N}{T}\, C + \delta I = \tfrac{N}{T} (C + \lambda I), \qquad \lambda = \tfrac{\delta T}{N}$$

    $\theta_*$ are the parameters of the model, at a minimum of $\frac NT L + \frac\delta2 \|\theta\|^2$; L is the mean
    loss over N examples, and C its curvature, by any estimator that has a `decompose`. The prior is
    $\mathcal N(0, \delta^{-1} I)$, and the likelihood of an example $\propto \exp(-\ell_n / T)$ at the temperature T.

    - For a loss that is a negative log-likelihood, such as [`kfax.softmax_cross_entropy`][], T = 1.
    - For [`kfax.squared_error`][], which has no factor 1/2, $T = 2 \sigma^2$ with noise of variance $\sigma^2$.

    To train with [`kfax.L2`][] of the coefficient η is to train with the prior of $\delta = \eta N / T$: then λ = η.

    It is exact for a linear model with squared error, if C is, and $\theta_*$ is the minimum. For all other models C is
    best by [`kfax.ExactGGN`][], which is the curvature of the model linearized in its parameters, as `predict` has it.
    With a block-diagonal C layers are independent of each other. λ is added to each eigenvalue of C, without the
    factored approximation that training may have.

    All of it comes from one eigendecomposition: for another δ or T make another one with the same `spectrum`, which
    costs nothing. A PyTree: jit over it, or differentiate by δ and T.

    **Fields:**

    - `parameters`: θ*, a PyTree like [`kfax.parameters_of`][]`(model, frozen=frozen)`.
    - `rest`: all else of the model.
    - `spectrum`: the eigendecomposition of C.
    - `num_examples`: N.
    - `prior_precision`: δ.
    - `temperature`: T.

    ??? cite "Source"
        MacKay 1992, "A practical Bayesian framework for backpropagation networks"; Ritter et al. 2018, "A scalable
        Laplace approximation for neural networks", for Kronecker factors, there with factored damping; Immer et al.
        2021, arXiv:2008.08400, for the linear model in `predict`; Daxberger et al. 2021, arXiv:2106.14806.
    """

    parameters: Parameters
    rest: Model
    spectrum: Eigendecomposition
    num_examples: Scalar
    prior_precision: Scalar
    temperature: Scalar

    def __init__(
        self,
        model: Model,
        spectrum: Eigendecomposition,
        num_examples: ArrayLike,
        prior_precision: ArrayLike,
        *,
        temperature: ArrayLike = 1.0,
        frozen: Where | None = None,
    ):
        """**Arguments:**

        - `model`: trained; tagged or not, as the estimator had it.
        - `spectrum`: the estimator's `decompose(state, parameters)`, with all training examples in its state:
            [`kfax.BlockDiagonalCurvature`][]`(kfax.ExactGGN(), decay=1.0)` for large models,
            [`kfax.ExplicitExactCurvature`][]`(decay=1.0)` for small ones.
        - `num_examples`: N, of the training set; with weights of examples their sum.
        - `prior_precision`: δ. [1/param²]
        - `temperature`: T, 2σ² for [`kfax.squared_error`][] with noise of variance σ². [loss]
        - `frozen`: as the estimator had it. What is frozen has no uncertainty: with all but the last layer frozen this
            is a last-layer Laplace approximation.

        **Raises:** `ValueError` for numbers that are not positive (within `jit` they become NaN), and for a spectrum
        that is not one of these parameters.
        """
        if not isinstance(spectrum, Eigendecomposition):
            raise ValueError(
                "`spectrum` must be an eigendecomposition, as from `estimator.decompose(state, "
                f"kfax.parameters_of(model))`, got {type(spectrum).__name__}."
            )
        parameters = any_parameters_of(model, frozen)
        try:
            jax.eval_shape(spectrum.split, parameters)
        except ValueError as error:
            raise ValueError(
                "`spectrum` is not that of the parameters of `model`. Give `kfax.Laplace` the model and the `frozen` "
                "that the estimator had."
            ) from error
        self.parameters = parameters
        self.rest = eqx.filter(model, trainable(model, frozen), inverse=True)
        self.spectrum = spectrum
        self.num_examples = positive("num_examples", num_examples)
        self.prior_precision = positive("prior_precision", prior_precision)
        self.temperature = positive("temperature", temperature)

    def log_evidence(self, log_likelihood: ArrayLike) -> Scalar:
        r"""The logarithm of the evidence (marginal likelihood) of the training set.

        $$\log p(D) \approx \log p(D \mid \theta_*) - \tfrac\delta2 \|\theta_*\|^2
        - \tfrac12 \sum_i \log\big(1 + \tfrac{N s_i}{T \delta}\big)$$

        $s_i$ are the eigenvalues of C. It tells which δ, which T and which of several models the data speak for. At
        another δ than that of training, $\theta_*$ is not the minimum: where the approximation is exact otherwise, the
        evidence is then larger by $\frac12 g^\top \Sigma\, g$, with g the gradient of
        $\frac NT L + \frac\delta2 \|\theta\|^2$. Train again where that matters.

        **Arguments:**

        - `log_likelihood`: $\log p(D \mid \theta_*)$, the sum over the training set. With a mean loss L it is `-N * L`
            for a cross-entropy (at T = 1), and `-N * (L / T + k / 2 * log(π T))` for [`kfax.squared_error`][] with k
            targets for each example.

        **Returns:** the logarithm. For many δ,
        `jax.vmap(lambda p: kfax.Laplace(model, spectrum, N, p).log_evidence(log_likelihood))(precisions)` takes one
        decomposition, and a number for each δ and parameter.
        """
        determinant = jnp.sum(jnp.log1p(self.spectrum.eigenvalues() / self._damping))
        penalty = self.prior_precision * dot(self.parameters, self.parameters)
        return scalar("log_likelihood", log_likelihood) - penalty / 2 - determinant / 2

    def predict(self, function: Callable[[Model], Array]) -> Predictive:
        r"""The distribution of outputs f, of the model linearized in its parameters.

        $$f \sim \mathcal N\big(f(\theta_*),\, J \Sigma J^\top\big)$$

        J is the exact derivative of the outputs in the parameters: one backward pass for each output, and as many
        products with the eigenvectors. Memory: as many vectors like the parameters as there are outputs.

        **Arguments:**

        - `function`: from a model like this one to an array of outputs, such as `lambda model: model(x)`. For many
            examples map over them, some at a time:
            `jax.lax.map(lambda x: laplace.predict(lambda model: model(x)), xs, batch_size=100)`. If outputs of several
            examples are computed by one function, their joint distribution is returned.

        **Returns:** mean and covariance. The noise of targets is not in it.

        **Raises:** `ValueError` if it is no function, or returns something else than one array of real numbers.
        """
        if not callable(function):
            raise ValueError(
                "`function` must be a function of the model, such as `lambda model: model(x)`, got "
                f"{type(function).__name__}."
            )

        def outputs(parameters):
            found = function(eqx.combine(parameters, self.rest))
            if not (eqx.is_array(found) and jnp.issubdtype(found.dtype, jnp.floating)):
                raise ValueError(
                    "`function` must return an array of real floating-point numbers, as `lambda model: model(x)` "
                    f"does, but it returned {type(found).__name__}."
                )
            return found

        mean, pullback = jax.vjp(outputs, self.parameters)
        units = jnp.eye(mean.size, dtype=mean.dtype).reshape(-1, *mean.shape)
        rows = jax.vmap(lambda unit: ravel_pytree(self._root(pullback(unit)[0]))[0])(units)
        covariance = linalg.matmul(rows, rows.T).reshape(mean.shape * 2)
        return Predictive(mean, covariance)

    def sample(self, key: PRNGKey) -> Model:
        r"""Draws a model, $\theta_* + \Sigma^{1/2} \varepsilon$.

        Where the posterior is wide, the model is not linear over its width, and draws predict worse than `predict`
        does, which is about the linearized one (Immer et al. 2021).

        **Arguments:**

        - `key`: for the draw. For an ensemble map over several:
            `equinox.filter_vmap(laplace.sample)(jax.random.split(key, 10))`.

        **Returns:** a model like the one given.
        """
        flat, unravel = ravel_pytree(wide(self.parameters))
        key = single_key(key)
        change = self._root(unravel(jax.random.normal(key, flat.shape, flat.dtype)))
        return eqx.combine(jax.tree.map(lambda x, by: (x + by).astype(x.dtype), self.parameters, change), self.rest)

    @property
    def _damping(self) -> Scalar:
        """λ."""
        return self.prior_precision * self.temperature / self.num_examples

    def _root(self, vector: Parameters) -> Parameters:
        """`Σ^{1/2} v`."""
        scale = jnp.sqrt(self.temperature / self.num_examples)
        root = self.spectrum.power(wide(vector), -1 / 2, self._damping)
        return jax.tree.map(lambda x: scale.astype(x.dtype) * x, root)
