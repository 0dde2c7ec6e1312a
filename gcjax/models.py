"""The models of the tasks: flax.nnx modules, and how they become pure functions."""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable, Callable]:
    """Turns the module that `build` makes into pure functions of plain dicts.

    Returns:
      init: key -> (params, model_state).
      apply: (params, model_state, inputs, training) -> (outputs, new model_state). The
        network is what its parameters are: layers may be thinner than those of `init`,
        and may be `Factored`; see `gcjax.pact.compressors`.
    """

    @functools.lru_cache
    def definition(factored):
        def with_factors():
            module = build(nnx.Rngs(0))
            for name in factored:
                setattr(module, name, Factored(getattr(module, name)))
            return module

        return nnx.graphdef(nnx.eval_shape(with_factors))

    definition(())  # a module that cannot be built fails here

    def init(key):
        _, params, stats = nnx.split(build(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def apply(params, model_state, inputs, training):
        model = nnx.merge(definition(_factored(params)), params, model_state)
        outputs = model(inputs, training)
        return outputs, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return init, apply


def _factored(params: dict) -> tuple[str, ...]:
    """Names of the layers whose parameters are those of `Factored`."""
    return tuple(name for name, part in params.items() if "narrow" in part)


class Factored(nnx.Module):
    """A convolution or dense layer of low rank: a narrow layer, then one that widens.

    The narrow layer has the kernel's extent, the other one is 1x1, so that the product
    of their kernels takes the place of the layer's. Widths are those of the parameters.
    """

    def __init__(self, layer):
        rngs, ends = nnx.Rngs(0), (layer.in_features, layer.out_features)
        if isinstance(layer, nnx.Conv):
            same = dict(strides=layer.strides, padding=layer.padding)
            size, bias = layer.kernel_size, layer.use_bias
            self.narrow = nnx.Conv(ends[0], 1, size, use_bias=False, rngs=rngs, **same)
            one = (1,) * len(size)
            self.widen = nnx.Conv(1, ends[1], one, use_bias=bias, rngs=rngs)
        else:
            self.narrow = nnx.Linear(ends[0], 1, use_bias=False, rngs=rngs)
            self.widen = nnx.Linear(1, ends[1], use_bias=layer.use_bias, rngs=rngs)

    def __call__(self, x):
        """Maps [..., n_in] to [..., n_out]."""
        return self.widen(self.narrow(x))


def _normal(std: float) -> Callable:
    """Makes an initialiser that draws from a normal distribution."""

    def init(key, shape, dtype=jnp.float32, **_):
        # Drawn flat: several axes take four times as long to compile on CPUs.
        return std * jax.random.normal(key, math.prod(shape), dtype).reshape(shape)

    return init


def _conv(c_in, c_out, size, rngs, **options) -> nnx.Conv:
    """Makes a convolution, initialised for ReLU (He et al., 2015, arXiv:1502.01852)."""
    init = _normal(math.sqrt(2 / (size * size * c_in)))
    return nnx.Conv(c_in, c_out, (size, size), kernel_init=init, rngs=rngs, **options)


def _linear(n_in, n_out, rngs, std=None) -> nnx.Linear:
    """Makes a dense layer; outputs have the variance of the inputs without `std`."""
    init = _normal(std or 1 / math.sqrt(n_in))
    return nnx.Linear(n_in, n_out, kernel_init=init, rngs=rngs)


def _pool(x: jax.Array, reduce: Callable) -> jax.Array:
    """Reduces 2x2 windows, faster on CPUs than `reduce_window`; crops odd sizes."""
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return reduce(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))


def _size(features: Callable, shape: tuple[int, ...]) -> int:
    """Counts what a function makes of one image of the given shape [h, w, c]."""
    return jax.eval_shape(features, jax.ShapeDtypeStruct((1, *shape), jnp.float32)).size


class Perceptron(nnx.Module):
    """Dense layers with ReLU in between; of one layer, logistic regression."""

    def __init__(self, sizes, rngs):
        self.depth = len(sizes) - 1
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes), 1):
            setattr(self, f"dense{i}", _linear(n_in, n_out, rngs))

    def __call__(self, x, training):
        """Computes logits [b, classes] from inputs [b, ...]."""
        del training
        x = x.reshape(x.shape[0], -1)
        for i in range(1, self.depth):
            x = nnx.relu(getattr(self, f"dense{i}")(x))
        return getattr(self, f"dense{self.depth}")(x)


def _logistic(shape, classes, norm, rngs) -> Perceptron:
    """Logistic regression on pixels: 7,850 parameters for Fashion-MNIST."""
    del norm
    return Perceptron((math.prod(shape), classes), rngs)


class SmallCNN(nnx.Module):
    """Three convolutions and a dense layer, made for CPUs.

    The first convolution has stride 2 (stride 1 on images up to 16x16), the others have
    average pooling behind them as long as there are more than 4 rows: 34,170 parameters
    for CIFAR-10, and 33,546 for 8x8 digits.
    """

    def __init__(self, shape, classes, norm, rngs):
        del norm
        size, stride = (3, 1) if min(shape[:2]) <= 16 else (4, 2)
        self.conv1 = _conv(shape[-1], 16, size, rngs, strides=stride)
        self.conv2 = _conv(16, 32, 3, rngs)
        self.conv3 = _conv(32, 64, 3, rngs)
        self.dense = _linear(_size(self.features, shape), classes, rngs)

    def features(self, x):
        """Computes [b, width] from images [b, h, w, c]."""
        x = nnx.relu(self.conv1(x))
        for conv in (self.conv2, self.conv3):
            x = nnx.relu(conv(x))
            x = _pool(x, jnp.mean) if min(x.shape[1:3]) > 4 else x
        return x.reshape(x.shape[0], -1)

    def __call__(self, x, training):
        """Computes logits [b, classes] from images [b, h, w, c]."""
        del training
        return self.dense(self.features(x))


class LeNet(nnx.Module):
    """Two convolutions of 5x5 with max pooling, then dense layers.

    With filters (6, 16) and hidden widths (120, 84) this is LeNet-5 with ReLU (62,006
    parameters for CIFAR-10). With (32, 32) and (256,) it is the CNN of two convolutions
    and two dense layers common in work on gradient compression (235,690 parameters).
    With (32, 64) and (512,) it is the one common in federated learning (582,026
    parameters for Fashion-MNIST).

    References:
      LeCun et al., 1998, Gradient-Based Learning Applied to Document Recognition.
      McMahan et al., 2017, Communication-Efficient Learning of Deep Networks from
        Decentralized Data, arXiv:1602.05629 (whose convolutions pad).
    """

    def __init__(self, filters, widths, shape, classes, norm, rngs):
        del norm
        self.conv1 = _conv(shape[-1], filters[0], 5, rngs, padding="VALID")
        self.conv2 = _conv(filters[0], filters[1], 5, rngs, padding="VALID")
        widths = (_size(self.features, shape), *widths, classes)
        self.depth = len(widths) - 1
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths), 1):
            setattr(self, f"dense{i}", _linear(n_in, n_out, rngs))

    def features(self, x):
        """Computes [b, width] from images [b, h, w, c]."""
        for conv in (self.conv1, self.conv2):
            x = _pool(nnx.relu(conv(x)), jnp.max)
        return x.reshape(x.shape[0], -1)

    def __call__(self, x, training):
        """Computes logits [b, classes] from images [b, h, w, c]."""
        del training
        x = self.features(x)
        for i in range(1, self.depth):
            x = nnx.relu(getattr(self, f"dense{i}")(x))
        return getattr(self, f"dense{self.depth}")(x)


class ConvNorm(nnx.Module):
    """A convolution without bias, then normalisation by "group" (or None) or "batch".

    References:
      Wu and He, 2018, Group Normalization, arXiv:1803.08494.
      Ioffe and Szegedy, 2015, Batch Normalization, arXiv:1502.03167.
    """

    def __init__(self, c_in, c_out, size, stride, norm, rngs):
        self.conv = _conv(c_in, c_out, size, rngs, strides=stride, use_bias=False)
        if norm == "batch":
            self.norm = nnx.BatchNorm(c_out, momentum=0.9, rngs=rngs)
        else:
            self.norm = nnx.GroupNorm(c_out, num_groups=32, rngs=rngs)

    def __call__(self, x, training):
        """Maps [b, h, w, c_in] to [b, h / stride, w / stride, c_out]."""
        if isinstance(self.norm, nnx.BatchNorm):
            return self.norm(self.conv(x), use_running_average=not training)
        return self.norm(self.conv(x))


class VGG11(nnx.Module):
    """Eight convolutions and one dense layer; images are pooled down to one pixel.

    References:
      Simonyan and Zisserman, 2014, Very Deep Convolutional Networks for Large-Scale
      Image Recognition, arXiv:1409.1556 (configuration A, there without normalisation).
    """

    # name, width, and whether pooling follows
    layers = tuple(
        (f"conv{i}", width, i in (1, 2, 4, 6, 8))
        for i, width in enumerate((64, 128, 256, 256, 512, 512, 512, 512), 1)
    )

    def __init__(self, shape, classes, norm, rngs):
        c_in = shape[-1]
        for name, c_out, _ in self.layers:
            setattr(self, name, ConvNorm(c_in, c_out, 3, 1, norm, rngs))
            c_in = c_out
        self.dense = _linear(c_in, classes, rngs)

    def __call__(self, x, training):
        """Computes logits [b, classes] from images [b, h, w, c]."""
        for name, _, pooled in self.layers:
            x = nnx.relu(getattr(self, name)(x, training))
            x = _pool(x, jnp.max) if pooled and min(x.shape[1:3]) > 1 else x
        return self.dense(x.mean((1, 2)))


class ResidualBlock(nnx.Module):
    """Two convolutions with a shortcut, which is 1x1 where the shape changes."""

    def __init__(self, c_in, c_out, stride, norm, rngs):
        self.conv1 = ConvNorm(c_in, c_out, 3, stride, norm, rngs)
        self.conv2 = ConvNorm(c_out, c_out, 3, 1, norm, rngs)
        self.projected = stride > 1 or c_in != c_out
        if self.projected:
            self.shortcut = ConvNorm(c_in, c_out, 1, stride, norm, rngs)

    def __call__(self, x, training):
        """Maps [b, h, w, c_in] to [b, h / stride, w / stride, c_out]."""
        y = self.conv2(nnx.relu(self.conv1(x, training)), training)
        return nnx.relu(y + (self.shortcut(x, training) if self.projected else x))


class ResNet18(nnx.Module):
    """ResNet-18 in the form for 32x32 images: 3x3 stem, no pooling before the blocks.

    References:
      He, Zhang, Ren and Sun, 2015, Deep Residual Learning for Image Recognition,
      arXiv:1512.03385.
    """

    # name, width and stride of each block
    blocks = tuple(
        (f"stage{stage}_block{block}", 32 << stage, 2 if stage > 1 == block else 1)
        for stage in (1, 2, 3, 4)
        for block in (1, 2)
    )

    def __init__(self, shape, classes, norm, rngs):
        c_in = 64
        self.stem = ConvNorm(shape[-1], c_in, 3, 1, norm, rngs)
        for name, c_out, stride in self.blocks:
            setattr(self, name, ResidualBlock(c_in, c_out, stride, norm, rngs))
            c_in = c_out
        self.dense = _linear(c_in, classes, rngs)

    def __call__(self, x, training):
        """Computes logits [b, classes] from images [b, h, w, c]."""
        x = nnx.relu(self.stem(x, training))
        for name, _, _ in self.blocks:
            x = getattr(self, name)(x, training)
        return self.dense(x.mean((1, 2)))


# Makers of image models: (shape [h, w, c], number of classes, norm, rngs) -> module.
MODELS: dict[str, Callable[..., nnx.Module]] = {
    "logistic": _logistic,
    "small_cnn": SmallCNN,
    "cnn4": functools.partial(LeNet, (32, 32), (256,)),
    "cnn4_wide": functools.partial(LeNet, (32, 64), (512,)),
    "lenet": functools.partial(LeNet, (6, 16), (120, 84)),
    "vgg11": VGG11,
    "resnet18": ResNet18,
}


class Block(nnx.Module):
    """Causal self-attention and a two-layer network, each with LayerNorm before it."""

    def __init__(self, d_model, num_heads, scale, rngs):
        self.num_heads = num_heads
        self.norm1 = nnx.LayerNorm(d_model, rngs=rngs)
        self.qkv = _linear(d_model, 3 * d_model, rngs, 0.02)
        self.out = _linear(d_model, d_model, rngs, scale)
        self.norm2 = nnx.LayerNorm(d_model, rngs=rngs)
        self.up = _linear(d_model, 4 * d_model, rngs, 0.02)
        self.down = _linear(4 * d_model, d_model, rngs, scale)

    def __call__(self, x):
        """Maps [b, t, d_model] to the same shape."""
        heads = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3 * self.num_heads, -1)
        q, k, v = jnp.split(heads, 3, axis=2)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """A decoder-only Transformer with learned positions.

    References:
      Vaswani et al., 2017, Attention Is All You Need, arXiv:1706.03762.
      Radford et al., 2019, Language Models are Unsupervised Multitask Learners
      (LayerNorm first, initialisation scaled by the depth).
      Press and Wolf, 2016, arXiv:1608.05859 (tied embeddings).
    """

    def __init__(self, vocab, d_model, num_layers, num_heads, seq_len, tied, rngs):
        embed = functools.partial(nnx.Embed, embedding_init=_normal(0.02), rngs=rngs)
        self.tied, self.num_layers = tied, num_layers
        self.embedding, self.position = embed(vocab, d_model), embed(seq_len, d_model)
        scale = 0.02 / math.sqrt(2 * num_layers)
        for i in range(1, num_layers + 1):
            setattr(self, f"block{i}", Block(d_model, num_heads, scale, rngs))
        self.norm = nnx.LayerNorm(d_model, rngs=rngs)
        if not tied:
            self.head = _linear(d_model, vocab, rngs, 0.02)

    def __call__(self, tokens, training):
        """Computes logits [b, t, vocab] from tokens int32 [b, t]."""
        del training
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))[None]
        for i in range(1, self.num_layers + 1):
            x = getattr(self, f"block{i}")(x)
        x = self.norm(x)
        return self.embedding.attend(x) if self.tied else self.head(x)
