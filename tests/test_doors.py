"""What is refused where a user's value enters the package, and unusual calls that work.

Each row is a call and words of its message. Without its check the call would end in a wrong result
without a word, or in an error that comes late or names no argument.
"""

import functools
import json

import keras
import numpy as np
import pytest
from backends import BACKEND, on_one_backend
from keras import ops as kops
from layer_checks import D, E, moe, normal

import keras_moe
from keras_moe import convert, inspection, layers, losses, ops, routers, tuner

T = 6
NAN = float("nan")
X = normal(2, 5, D)
MIXTRAL = {"model_type": "mixtral", "hidden_size": D, "intermediate_size": 16}
MIXTRAL = {**MIXTRAL, "num_local_experts": E, "num_experts_per_tok": 2}


def t(*shape):
    return kops.convert_to_tensor(normal(*(shape or (T, D))))


def ints(*shape):
    return np.zeros(shape, "int32")


def true(*shape):
    return np.ones(shape, bool)


def dense(units=D, **kwargs):
    return keras.layers.Dense(units, **kwargs)


def bank(num_experts=E, **kwargs):
    return layers.FeedForwardExperts(num_experts, 16, **kwargs)


def dense_experts(*units):
    return layers.LayerExperts([dense(each) for each in units])


def two_activations():
    return layers.LayerExperts([dense(activation=name) for name in ("relu", "tanh", "tanh")])


def built(layer):
    layer.build((None, D))
    return layer


def lora(layer):
    built(layer).experts.enable_lora(2)
    return layer


def routing(num_tokens=T, num_experts=E, top_k=2, **changes):
    return ops.top_k_routing(t(num_tokens, num_experts), top_k)._replace(**changes)


def plan(**kwargs):
    made = routing(**kwargs)
    return ops.GroupedPlan.of(made.indices, made.weights, made.probs.shape[1])


def model(**kwargs):
    made = keras.Sequential([keras.Input((5, D)), moe(name="moe", **kwargs), dense(2)])
    made.compile("sgd", "mse")
    return made


@functools.cache
def usual():
    """One model for all rows, which do not change it."""
    return model()


def plain(activation="relu", **kwargs):
    """A model with a dense feed-forward layer."""
    return keras.Sequential(
        [keras.Input((D,)), dense(16, activation=activation, **kwargs), dense()]
    )


def fitted(callback, **kwargs):
    made = model(**kwargs) if kwargs else usual()
    return made.fit(X, normal(2, 5, 2), verbose=0, callbacks=[callback])


def loaded_into_a_wider_bank():
    keras.Sequential([keras.Input((D,)), moe()]).save_weights("narrow.weights.h5")
    wider = moe(layers.FeedForwardExperts(E, 24))
    keras.Sequential([keras.Input((D,)), wider]).load_weights("narrow.weights.h5")


def with_loss(**methods):
    return moe(router_losses=[own_part(losses.RouterLoss, **methods)])(t(), training=True)


def dense_fitted(callback):
    made = keras.Sequential([keras.Input((D,)), dense()])
    made.compile("sgd", "mse")
    return made.fit(t(), t(), verbose=0, validation_split=0.5, callbacks=[callback])


def block():
    return layers.TransformerEncoderBlock(2, moe())


def writer(shape=(None,)):
    """A small language model for texts of a shape."""
    ids = keras.Input(shape, dtype="int32")
    hidden = layers.TransformerDecoderBlock(2, dense())(keras.layers.Embedding(9, D)(ids))
    return keras.Model(ids, dense(9)(hidden))


def translator():
    """A small model with an encoder and a decoder."""
    source, ids = (keras.Input((None,), dtype="int32") for _ in range(2))
    embed = keras.layers.Embedding(9, D)
    block = layers.TransformerDecoderBlock(2, dense(), cross_attention=True)
    return keras.Model([source, ids], dense(9)(block(embed(ids), context=embed(source))))


def ids_layer():
    return moe(router=routers.HashRouter(E, vocabulary_size=10))


def encode(feedforward=None, inputs=X, num_heads=2, **kwargs):
    return layers.TransformerEncoderBlock(num_heads, feedforward or dense())(inputs, **kwargs)


def decoder(cross_attention=False):
    block = layers.TransformerDecoderBlock(2, dense(), cross_attention=cross_attention)
    block(X, **({"context": t(2, 3, D)} if cross_attention else {}))
    return block


def decode(num_rows=2, length=1, position=0, **kwargs):
    block = decoder()
    cache = block.make_cache(2, 5)
    return block(t(num_rows, length, D), cache=cache, position=position, **kwargs)


def own(**changes):
    """A router, in whatever module, whose routing has something wrong."""
    parts = {"route": lambda *_, **__: routing(**changes), "__module__": "keras_moe.own"}
    router = own_part(routers.Router, E, top_k=2, **parts)
    return moe(router=router, router_losses=())(t())


def own_part(base, *args, **methods):
    """An instance of a subclass."""
    return type("Own", (base,), methods)(*args)


def with_layer(layer):
    """A bank whose network calls a Keras layer."""

    class Bank(layers.StackedExperts):
        def widths(self, features):
            return {"up": (features, features)}

        def network(self, rows, linear):
            return self.layer(linear("up", rows))

    experts = Bank(E)
    experts.layer = layer
    return experts


def own_bank(widths, **parts):
    """A bank whose network adds its vectors to the result of its one linear map."""

    def network(bank, rows, linear):
        outputs = linear("up", rows)
        for name in bank.vectors:
            outputs = outputs + linear(name)
        return outputs

    vectors = [name for name, each in widths.items() if len(each) == 1]
    parts |= {"widths": lambda *_: widths, "network": network, "vectors": vectors}
    return own_part(layers.StackedExperts, E, **parts)


def logits(router, tokens, mask, training, **context):
    return kops.zeros((T, E))


def trained(**kwargs):
    return moe(**kwargs)(t(), training=True)


def balanced(**methods):
    balancer = own_part(routers.SelectionBalancer, **methods)
    return trained(router=routers.TopKRouter(E, balancer=balancer))


def tasks(num_tasks=2, **kwargs):
    return layers.MultiGateMixtureOfExperts(bank(), num_tasks, **kwargs)


def of_task_banks(*shapes):
    return tasks(task_experts=[bank(), bank()])([t(*shape) for shape in shapes])


def masked(make):
    """The output of layers after an embedding with a mask."""
    return make(keras.layers.Embedding(9, D, mask_zero=True)(keras.Input((5,))))


def likelihood(y_true, shape=(6, 3, 3), **kwargs):
    return losses.MixtureNegativeLogLikelihood(**kwargs)(y_true, t(*shape))


def replay(indices):
    with inspection.replay_routings(usual(), {"moe": indices}):
        return usual()(X)


def reported(x=None, path="r.html", **kwargs):
    return keras_moe.report(usual(), normal(T, 5, D) if x is None else x, path=path, **kwargs)


def hugging_face(layer=0, config=MIXTRAL, **kwargs):
    mixture = built(layers.MixtureOfExperts(layers.GatedExperts(E, 16)))
    weights = convert.to_hugging_face(mixture, 0, "mixtral")
    return convert.from_hugging_face(weights, layer, config, **kwargs)


# Constructors with arguments out of their range: the message begins with the name.
ARGUMENTS = [
    ("layers.MixtureOfExperts(bank(), {})", "capacity_factor=0", "capacity_factor='1'"),
    ("layers.MixtureOfExperts(bank(), {})", "capacity_factor=NAN", "token_axes=0", "router=bank()"),
    ("layers.FeedForwardExperts(hidden_dim=8, {})", "num_experts=0", "num_experts=4.5"),
    ("layers.FeedForwardExperts(E, {})", "hidden_dim=0", "hidden_dim='8'"),
    ("layers.GatedExperts(E, 8, {})", "clip=0", "up_shift=NAN", "output_dim=0"),
    ("layers.LinearExperts(E, {})", "output_dim=0", "output_dim=2.5"),
    ("layers.ZeroComputationExperts(bank(), {})", "num_zero=-1", "num_identity=0.5"),
    ("layers.Capacity(1, {})", "minimum=0", "multiple_of=0", "evaluation_factor=0", "priority='x'"),
    ("layers.TransformerEncoderBlock(feedforward=dense(), {})", "num_heads=0", "num_heads=1.5"),
    ("layers.TransformerEncoderBlock(2, dense(), {})", "dropout=1", "dropout=-0.1"),
    ("tasks({})", "num_tasks=0", "num_tasks=2.5", "num_tasks=True"),
    ("routers.TopKRouter({})", "num_experts=0"),
    ("routers.TopKRouter(E, {})", "top_k=0", "score='x'", "scaling_factor=0", "input_jitter=1"),
    ("routers.TopKRouter(E, {})", "logit_noise=-1", "seed=1.5", "seed=-1", "temperature=0"),
    ("routers.TopKRouter(E, {})", "temperature=NAN", "hidden_dim=0"),
    ("routers.GroupLimitedRouter(8, {})", "num_groups=0", "top_groups=0"),
    ("routers.GShardRouter(E, {})", "threshold=0"),
    ("routers.TopPRouter(E, {})", "threshold=1.0"),
    ("routers.ReLURouter(8, {})", "growth=1.0", "initial_strength=0"),
    ("routers.HashRouter(E, {})", "vocabulary_size=0", "vocabulary_size=None"),
    ("routers.HashRouter(E, vocabulary_size=9, {})", "top_k=0", "seed=0.5"),
    ("routers.ExpertChoiceRouter(E, {})", "capacity_factor=-1"),
    ("routers.SinkhornRouter(E, {})", "iterations=0", "top_k=0"),
    ("layers.LowRankExperts(bank(1), {})", "num_experts=0, rank=1", "rank=0, num_experts=1"),
    ("layers.LowRankExperts(bank(1), E, 2, {})", "alpha=0"),
    ("routers.LossFreeBias({})", "rate=0", "accumulation_steps=0"),
    ("routers.QuantileBias({})", "momentum=1.0"),
    ("losses.LoadBalance({})", "weight=-1", "weight=NAN", "weight='0.1'", "scope='device'"),
    ("losses.MixtureNegativeLogLikelihood({})", "distribution='x'", "scale=0", "dtype='bfloat16'"),
    ("callbacks.ExpertHealth({})", "every=0", "patience=1.5", "stop=1.5"),
    ("upcycle(plain(), {})", "num_experts=0", "every=0", "reinitialized=1.0"),
    ("surgery.add_experts(usual(), {})", "factor=1", "noise=-1"),
    ("tuner.SearchSpace({})", "active_width='64'", "active_width=()"),
    ("tuner.SearchSpace((8,), {})", "routers=('soft',)", "loss_weights=dict(x=[1])"),
]

OWN_QUANTIZER = keras.quantizers.Int8QuantizationConfig(keras.quantizers.AbsMaxQuantizer(0))
REFUSED = [
    ("moe(dense_experts(D, D), token_axes=1)(X, mask=true(2, 5))", "`mask` must have"),
    ("(lambda each: tasks(task_experts=[each, each]))(bank())", "different objects"),
    ("own_part(routers.TopKRouter, E, select=lambda _, x: x[:, :2])(t())", "dtype of int"),
    # Calls of layers.
    ("moe()(ints(T, D))", "`inputs` must have a dtype of float"),
    ("moe()(None)", "must be called with tensors"),
    ("moe()(t(D))", "at least one axis of tokens"),
    ("moe()({'a': t()})", "`inputs` must be one tensor"),
    ("moe()([t(), t()])", "`inputs` must be one tensor"),
    ("moe()(X, mask=true(5, 2))", "`mask` must have"),
    ("moe()(X, mask=np.ones((2, 5)))", "bool or int"),
    ("moe()(t(), indices=[[0, E]] * T)", "from 0 to 3"),
    ("moe()(t(), indices=ints(9, 2))", "`indices` must have"),
    ("moe(router='soft')(t(), indices=ints(T, 1))", "replayed"),
    ("ids_layer()(X, token_ids=ints(5, 2))", "`token_ids` must"),
    ("ids_layer()(t(), token_ids=np.zeros(T))", "dtype of int"),
    ("ids_layer()(t())", "token_ids=None"),
    ("moe()(X, router_inputs=t(5, 2, D))", "`router_inputs` must have"),
    ("moe(router='soft')(t(), return_expert_outputs=True)", "assigns tokens to experts"),
    ("moe(token_axes=1)(X)", "use `LayerExperts`"),
    ("bank()(t(), plan(num_experts=2))", "`plan` must be of"),
    ("routers.TopKRouter(E)(ints(T, D))", "dtype of float"),
    ("routers.TopKRouter()(t())", "needs `num_experts`"),
    ("encode(inputs=ints(2, 5, D))", "dtype of float"),
    ("encode(mask=true(2, 1))", "`mask` must have"),
    ("decoder(True)(X)", "needs its context by name: `context=context`"),
    ("decoder(True)(X, t(2, 3, D))", "needs its context by name: `context=context`"),
    ("decoder(True)(X, context=t(2, 3, D), context_mask=true(2, 5))", "`context_mask` must"),
    ("decode(length=5, position=1)", "must fit into the cache"),
    ("decode(position=1.7)", "`position` must be an integer"),
    ("decode(num_rows=1)", "with B=2"),
    ("decoder()(t(2, 1, D), position=3)", "passed together"),
    ("decode(context=t(2, 3, D))", "`context` needs `cross_attention` and no `cache`"),
    ("decoder()(X, context_mask=true(2, 5))", "`context_mask` a `context`"),
    ("decoder(True).make_cache(2, 5, t(3, 3, D))", "`context` must have"),
    ("layers.TransformerDecoderBlock(2, dense()).make_cache(2, 5)", "must be built"),
    ("of_task_banks((T, D), (T, D))", "one for each task"),
    ("of_task_banks((T, D), (5, D), (T, D))", "`inputs[1]` must"),
    ("bank()(t())", "use `MixtureOfExperts(bank)`"),
    # Constructors, and what shows when a layer is built.
    ("moe(num_experts=8)", "multiple values for its experts"),
    ("layers.MixtureOfExperts(8, num_experts=8)", "multiple values for its experts"),
    ("layers.MixtureOfExperts([dense()], hidden_dim=8)", "multiple values for its experts"),
    ("layers.MixtureOfExperts(8)", "`hidden_dim` must be an integer"),
    ("layers.MixtureOfExperts(hidden_dim=8)", "`num_experts` must be an integer"),
    ("layers.MixtureOfExperts(router='top_k')", "`experts` must be"),
    ("layers.MixtureOfExperts(dense())", "`LayerExperts([layer, layer])`"),
    ("moe(router='topk')", "'top_k', 'top_p'"),
    ("moe(balancer='quantile')", "`balancer` is an argument of `TopKRouter`"),
    ("moe(dropout=0.1)", "`dropout` is an argument of the bank"),
    ("moe(d_fff=64)", "Unrecognized keyword arguments"),
    ("moe(units=64)", "`output_dim` here, the width"),
    ("routers.TopKRouter(E, k=2)", "`k` is `top_k` here"),
    ("moe(aux_loss_weight=0.1)", "`aux_loss_weight` is `router_losses` here, such as `[losses.Loa"),
    ("moe(load_balancing_loss=0.1)", "`load_balancing_loss` is `router_losses` here"),
    ("moe(losses=[])", "`losses` is `router_losses` here"),
    ("moe(num_shared_experts=2)", "`num_shared_experts` is `shared_expert` here"),
    ("layers.MixtureOfExperts(expert=[])", "`expert` is `experts` here"),
    ("moe(noisy_gating=True)", '`noisy_gating` is a router here, `router="noisy_top_k"`'),
    ("layers.MoE(8, 64)", "did you mean `hidden_dim=64`?"),
    ("layers.MoE(num_experts=8, hidden_dim=64, activation='swiglu')", "`GatedExperts`"),
    ("layers.TransformerEncoderBlock(4)", "`MixtureOfExperts(num_experts=8, hidden_dim=256)`"),
    ("layers.TransformerEncoderBlock(4, num_experts=8)", "`MixtureOfExperts(num_experts=8,"),
    (
        "(lambda r: layers.MultiGateMixtureOfExperts(bank(), 2, [r, r]))(routers.TopKRouter())",
        "twice",
    ),
    ("layers.FeedForwardExperts(n_experts=8, hidden_dim=8)", "'num_experts'"),
    ("moe(router='gshard', top_k=1)", "Received: top_k=1 for a `GShardRouter`"),
    ("moe(router='expert_choice', top_k=2)", "such as `TopKRouter`"),
    ("bank(top_k=2)", "`top_k` is an argument of `MixtureOfExperts`, for routers"),
    ("tasks(capacity_factor=1.0)", "`capacity_factor` is an argument of `MixtureOfExperts`"),
    ("moe(router='hash')", "`HashRouter(vocabulary_size="),
    ("moe(router=routers.TopKRouter)", "TopKRouter'> (of type"),
    ("routers.TopKRouter(balancer=routers.LossFreeBias)", "LossFreeBias'> (of type"),
    ("moe(router=own_part(routers.Router))", "must set `top_k`"),
    ("moe(router=routers.TopKRouter(E), top_k=1)", "agree with the `router`"),
    ("moe(top_k=5)", "at most `num_experts`"),
    ("moe(top_k='2')", "`top_k` must be an integer"),
    ("moe(layers.LayerExperts([keras.layers.Conv2D(D, 3)]))(t(2, 8, 8, 3))", "`token_axes=1`"),
    (
        "layers.MixtureOfExperts([keras.Sequential([keras.Input((3,)), dense()])])(t())",
        "found shape=(None, 8)",
    ),
    ("moe(router=routers.TopKRouter(8))", "same number of experts"),
    ("moe(router_losses='load_balance')", "must be a list"),
    ("moe(shared_expert=keras.layers.GlobalAveragePooling1D())(X)", "must keep"),
    ("moe(activity_regularizer='l2')(X, return_routing=True)", "`activity_regularizer` must"),
    ("moe(shared_expert=dense(1))(t())", "as many features"),
    ("moe(gated_shared_expert=True)", "needs a `shared_expert`"),
    ("moe(router='soft', capacity_factor=1.0)", "not a token-choice"),
    ("moe(bank(activation=lambda x: x[:, :1]))(t())", "must have rows of"),
    ("moe(bank(activation=keras.layers.PReLU()))(t())", "must have no weights"),
    ("moe(with_layer(keras.layers.Dropout(0.9)))(t())", "`linear.dropout(rows, rate)` draws"),
    ("moe(with_layer(keras.layers.BatchNormalization()))(t())", "must have no weights"),
    ("moe(with_layer(dense()))(t())", "must have no weights"),
    ("moe(layers.LayerExperts([bank()]))(t())", "use `MixtureOfExperts(bank)`"),
    ("layers.LayerExperts([usual().layers[1]] * 2)", "different objects"),
    ("layers.LayerExperts(dense())", "`layers` must be a list"),
    ("layers.LayerExperts([abs])", "`keras.layers.Lambda`"),
    ("setattr(moe(), 'top_k', 1)", "no setter"),
    ("setattr(moe(), 'capacity_factor', 2.0)", "no setter"),
    ("setattr(moe(), 'router_losses', [])", "no setter"),
    ("setattr(moe().router_losses[0], 'weight', 1)", "set_router_loss_weight"),
    ("setattr(built(moe()).router, 'top_k', 1)", "surgery.set_top_k"),
    ("built(moe()).quantize('int8')", "`layer.experts.quantize(mode)`"),
    ("built(moe()).enable_lora(4)", "`layer.experts.enable_lora(rank)`"),
    ("moe().read_counts()", "must be built"),
    ("built(moe()).read_counts().since([1])", "of the same layer"),
    ("built(moe()).read_counts().since(built(moe(bank(1))).read_counts())", "of the same layer"),
    ("moe(dense_experts(D, 1))(t())", "one known shape"),
    ("moe(layers.ZeroComputationExperts(dense_experts(3), 1))(t())", "as they receive"),
    ("moe(layers.ZeroComputationExperts(bank(), 1), router='expert_choice')(t())", "tokens ch"),
    ("encode(dense(D + 1))", "for the residual"),
    ("encode(bank())", "`feedforward` must not be a bank"),
    ("moe(shared_expert=bank())(t())", "`shared_expert` must not be a bank"),
    ("tasks(task_names=['a'])", "one for each task"),
    ("tasks(task_names=['a', 'a'])", "must be different strings"),
    ("tasks(task_names=['a', ''])", "must be different strings that are not empty"),
    ("tasks(task_names=[0, 1])", "must be different strings that are not empty"),
    ("tasks(router=routers.TopKRouter(E + 1))", "same number of experts"),
    ("tasks(router='soft')", "must choose experts"),
    ("tasks(router=routers.HashRouter(E, vocabulary_size=9))", "must choose experts"),
    ("tasks(task_experts=[bank(output_dim=3), bank()])([t()] * 3)", "same number of features"),
    ("routers.TopKRouter(E, dtype='bfloat16')", "always computes in float32"),
    ("routers.TopKRouter(E, balancer=losses.LoadBalance())", "`balancer` must"),
    ("routers.TopKRouter(E, kernel_initializer=lambda s, dtype: t(D, 1))(t())", "`kernel_i"),
    ("routers.GroupLimitedRouter(8, num_groups=4, top_groups=1, top_k=4)", "`top_groups`"),
    ("losses.LoadBalance(scope='global')(routing())", "outside of one"),
    ("losses.LoadBalance()(t(), t())", "one of `router_losses`"),
    ("trained(router_losses=[own_part(losses.RouterLoss)])", "must implement `compute(routing)`"),
    ("trained(router=own_part(routers.noisy.NoisyRouter, E))", "`Own` must implement `deviation`"),
    (
        "trained(router=own_part(routers.matching.MatchingRouter, E, top_k=1))",
        "`Own` must implement `match`",
    ),
    ("balanced()", "`Own` must implement `measure`"),
    ("balanced(measure=lambda *_: t(E))", "`Own` must implement `update`"),
    ("own_part(layers.gate.Gate).banks", "`Own` must implement `banks`"),
    ("losses.get(losses.MixtureNegativeLogLikelihood())", "an instance of `RouterLoss`"),
    ("likelihood(t(6, 1))", "`y_true` must have"),
    ("likelihood(t(6, 1), (6, 3, 4), scale=None)", "even number of outputs"),
    ("likelihood(t(6, 1), (6, 3, 3), scale=None, normalized=False)", "no lower bound"),
    ("likelihood(t(6, 3, 3), (6, 2))", "`y_pred` must have"),
    ("losses.MixtureNegativeLogLikelihood().mean(t(6, 2))", "`y_pred` must have"),
    ("losses.pack_mixture(routing(), t(2, 6, 2))", "each weight"),
    # Parts of a user, where their results come in.
    (
        "moe(router=own_part(routers.Router, E, top_k=2, route=logits))(t())",
        "return an `ops.Routing`",
    ),
    ("moe(own_bank({'up': (D, D), 'activation': (D,)}))(t())", "Received: ['activation']"),
    ("moe(own_bank({'up': (D, D), 'network': (D,)}))(t())", "Received: ['network']"),
    ("moe(own_bank({'up': (D, D), 'up_bias': (D,)}))(t())", "Received: ['up_bias']"),
    ("own(top_k=1)", "`indices` must have"),
    ("own(indices=t(T, 2))", "`indices` must have a dtype"),
    ("own(counts=ints(1, E))", "`counts` must have the shape"),
    (
        "trained(router_losses=[own_part(losses.RouterZ, compute=lambda _, x: x.load)])",
        "must have the shape ()",
    ),
    ("balanced(measure=lambda *_: t(1))", "`balancer.measure(...)` must have"),
    # Functions.
    ("ops.top_k_routing(t(T, E), 2, true(5))", "`mask` must have"),
    ("layers.Capacity(True)", "`capacity_factor` must be a finite number"),
    ("ops.top_k_routing(t(T, E), 5)", "`top_k` must be at most"),
    ("ops.top_k_routing(t(T, E), 2, score='x')", "`score` must be one of"),
    ("plan().dispatch(t(9, D))", "must have the shape"),
    ("plan().combine(t(5, D))", "a row for each assignment"),
    ("ops.grouped_matmul(t(6, 4), t(3, 4, 8), [2, 2, 4])", "`group_sizes` must"),
    ("ops.grouped_matmul(t(6, 4), t(3, 4, 8), [2, 4])", "`group_sizes`"),
    ("ops.grouped_matmul(t(6, 4), t(3, 8, 4), [2, 2, 2])", "`kernels` must"),
    ("metrics.load_imbalance(np.ones((2, 4)))", "`counts` must have"),
    ("metrics.load_entropy([-1, 2])", "at least 0"),
    ("metrics.load_imbalance(routing())", "such as `routing.counts`"),
    ("metrics.load_imbalance(moe())", "or `layer.expert_counts`"),
    ("metrics.count_table(routing(), [0] * 5, 2)", "`groups` must have"),
    # Tools.
    ("inspection.record_routings(usual(), normal(2, 5, D))", "list of batches"),
    ("inspection.replay_routings(usual(), {'m': routing()})", "names of MoE layers, ['moe']"),
    ("inspection.replay_routings(usual(), {'moe': [routing()]})", "must be one routing"),
    ("inspection.moe_layers(plain())", "must have a `MixtureOfExperts`"),
    ("health.judge_drops(5)", "must be a share"),
    ("reported(path='no/r.html')", "a folder that exists"),
    ("keras_moe.report(plain(), normal(T, D), path='r.html')", "must have a `MixtureOfExperts`"),
    ("reported([normal(6, 5, D), normal(6, 5, D)])", "one for each of 1 inputs"),
    ("reported(labels=[1, 2])", "each of 6 documents"),
    ("reported(labels=np.zeros(6))", "must be integers or strings"),
    ("visualization.coactivation([[1, 9]], num_experts=4)", "from 0 to 3"),
    ("surgery.prune_experts(usual(), keep=2.5, by=[1, 2, 3, 4])", "`keep` must be"),
    ("surgery.prune_experts(usual(), keep=1, by=[1, 2, 3, 4])", "`top_k`"),
    ("surgery.prune_experts(usual(), by=np.ones(5))", "for the 4 experts"),
    ("surgery.prune_experts(usual())", "must be measured on `data`"),
    ("surgery.prune_experts(usual(), data=(normal(2, 5, D),) * 2)", "list of batches"),
    ("surgery.prune_experts(built(moe(router='expert_choice')))", "logits do not choose"),
    ("surgery.merge_experts(lora(moe()), data=[normal()])", "LoRA"),
    ("surgery.merge_experts(built(moe(two_activations())))", "layers, activations"),
    (
        "surgery.prune_experts(built(moe(router=own_part(routers.TopKRouter, surgeries=()))))",
        "`surgeries` do not include 'cut'",
    ),
    ("surgery.set_top_k(built(ids_layer()), 1)", "by their scores"),
    ("surgery.set_top_k(built(moe(router='dselect_k')), 1)", "by their scores"),
    ("surgery.add_experts(lora(moe()))", "LoRA"),
    ("surgery.add_experts(built(moe(two_activations())))", "`LayerExperts`"),
    ("surgery.add_experts(built(moe(router=routers.ReLURouter())))", "`ReLURouter`"),
    ("surgery.add_experts(usual(), factor={'x': 2})", "`factor` must name"),
    ("upcycle(plain(), 8, 2, granularity=3)", "must be a multiple of"),
    ("upcycle(plain(), 4, 2, granularity=2, rank=2)", "share the dense layer of one"),
    ("upcycle([plain(), plain()], 3)", "number of models"),
    ("upcycle([])", "0 models"),
    ("upcycle([plain(), plain()], rank=2)", "share the dense layer of one"),
    ("upcycle([plain(), plain('tanh')])", "must have the same layers"),
    ("upcycle([plain(), plain(use_bias=False)])", "shapes of weights"),
    ("freeze_all_but(plain(), 'lora')", "`pattern` must"),
    ("freeze_all_but(plain(), ['dense'])", "`pattern` must be a regular expression"),
    ("merge_lora(plain())", "must have `LowRankExperts`"),
    ("layers.LowRankExperts(dense_experts(D), E, 2)", "`base` must be a bank with stacked"),
    ("layers.LowRankExperts(bank(2), E, 2)", "`base` must have one expert"),
    ("upcycle(plain('softmax'), 4, 2, granularity=2)", "softmax"),
    ("upcycle(plain(kernel_constraint='non_neg'))", "able to do"),
    (
        "upcycle(keras.Sequential([dense(16, activation='relu'), dense()]))",
        "a model that is not built",
    ),
    ("upcycle(keras.Sequential([keras.Input((D,)), dense(name='a')]))", "`a` (8, 8)"),
    (
        "upcycle(keras.Sequential([keras.Input((D,)), dense(16, activation='relu'), dense(3)]))",
        "(16, 3)",
    ),
    ("upcycle(keras.Sequential([keras.Input((5, D)), moe(name='m')]))", "mixture `m`"),
    ("hugging_face(layer=5)", "must have all its weights"),
    ("hugging_face(config={**MIXTRAL, 'num_local_experts': 3})", "must match"),
    ("hugging_face(into=built(moe()))", "must be a block of"),
    ("convert.use_sparse_experts(plain())", "must have a MoE block"),
    ("moe(hidden_size=8)", "the width of the inputs"),
    ("moe(intermediate_dim=8)", "`hidden_dim` here"),
    ("moe(z_loss_weight=0.1)", "losses.RouterZ(0.001)"),
    ("moe(gated=True)", "`GatedExperts(num"),
    ("moe(dropless=True)", "the default"),
    ("moe(router_jitter_noise=0.1)", "input_jitter"),
    ("layers.GatedExperts(E, 8, activation='swiglu')", 'activation="silu"'),
    ("bank(activation='glu')", "`GatedExperts` have a gate"),
    ("loaded_into_a_wider_bank()", "`up_kernel` must have the shape of the saved"),
    ("moe()(X, router_inputs=t())", "`router_inputs` must have at least"),
    ("moe()(X, mask=-np.eye(2, 5, dtype=int))", "`mask` must be True"),
    ("layers.LowRankExperts(E, 8, 2)", "`base` must be"),
    ("callbacks.RouterLossSchedule(abs, loss='z')", "`loss` must be"),
    ("layers.MixtureOfExperts([])", "`experts` must be"),
    ("convert.to_hugging_face(moe(), 0, 'mixtral')", "must be built"),
    ("convert.from_hugging_face('mistralai/Mixtral', 0)", "a folder on this machine"),
    ("convert.from_hugging_face({}, 0, config=5)", "`config` must be a dict"),
    ("own_part(routers.Router, E, top_k=2)(t())", "must implement `route`"),
    ("own_part(routers.Router, E, top_k=2, call=lambda *_: 0)(t())", "`route`, not `call`"),
    ("moe(router='expert_choice', top_k=1)", "for routers such as `TopKRouter`"),
    ("routers.TopKRouter(jitter=0.1)", "`input_jitter` of a `router`"),
    ("moe(shared_experts=1)", "`shared_expert` here"),
    ("layers.TransformerEncoderBlock(2, feed_forward=dense())", "`feedforward` here"),
    ("own_part(layers.StackedExperts, E).build((None, D))", "must implement `widths`"),
    ("with_loss(compute=lambda *_: None)", "must return a number"),
    ("built(moe()).set_router_loss_weight('router_z', 1.0)", "`index` must be one of 0, 1"),
    ("metrics.router_entropy(np.ones(E))", "`routing` must be an `ops.Routing`"),
    ("metrics.typical_words(routing(), ['a'])", "a string for each of 6 tokens"),
    ("metrics.load_imbalance({'moe': [1, 2]})", "`counts` must be numbers"),
    ("losses.pack_mixture(t(), routing())", "`routing` must be"),
    ("callbacks.ExpertMonitor(metrics=max)", "`metrics` must be a list"),
    ("freeze_all_but(usual(), '*lora')", "`pattern` must be a regular"),
    ("tuner.SearchSpace((5,), top_k=(2,))", "divisible by"),
    ("tuner.SearchSpace((8,), capacity_factors=(0,))", "`capacity_f"),
    ("fitted(callbacks.RouterLossSchedule(lambda e: -1))", "must be a finite"),
    ("keras_moe.generate(writer((4,)), [[1, 2]], 3)", "keras.Input((None,)"),
    ("keras_moe.generate(plain(), [[1, 2]], 3)", "0 blocks"),
    ("keras_moe.generate(translator(), [[1, 2]], 3)", "1 blocks, 1 with it"),
    ("keras_moe.generate(writer(), [[1, 9]], 3)", "from 0 to 8"),
    ("fitted(callbacks.RouterLossSchedule(abs), router_losses=['router_z'])", "the router loss"),
    ("callbacks.ExpertMonitor(metrics=[max, max])", "different names"),
    ("callbacks.ExpertMonitor(metrics=['load_imbalance'])", "must be functions of counts"),
    ("built(bank()).quantize('float8')", '`mode` must be "int8"'),
    ("built(bank()).quantize(config=OWN_QUANTIZER)", "`weight_quantizer`"),
    # Their second argument is none that all routers have.
    ("routers.CosineRouter(8, 4)", "positional argument"),
    ("routers.DenseRouter(8, 0.1)", "positional argument"),
    ("routers.ExpertChoiceRouter(8, 4)", "positional argument"),
    ("routers.GShardRouter(8, 0.5)", "positional argument"),
    ("routers.GroupLimitedRouter(8, 4)", "positional argument"),
    ("routers.SoftRouter(8, 4)", "positional argument"),
    ("routers.TopPRouter(8, 0.5)", "positional argument"),
]
REFUSED += [
    (call.format(argument), f"`{argument.partition('=')[0]}` must be")
    for call, *arguments in ARGUMENTS
    for argument in arguments
]


def evaluate(call):
    return eval(call, {**vars(keras_moe), **globals(), "tuner": tuner})


@on_one_backend
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call, words", REFUSED, ids=[call for call, _ in REFUSED])
def test_refused(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    errors = (AttributeError, TypeError, ValueError, NotImplementedError)
    with pytest.raises(errors) as error:
        evaluate(call)
    assert words in str(error.value)


WARNED = [
    ("moe(router='expert_choice')(t())", "rest of the batch"),
    ("moe(router_losses=['load_variation'])", "has no effect with a `TopKRouter`"),
    ("moe(router='expert_choice', router_losses=['load_variation'])", "load is always even"),
    ("masked(lambda x: moe()(keras.layers.LayerNormalization()(x + 1)))", "mask .* is lost"),
    ("masked(lambda x: encode(inputs=2 * x))", "mask .* is lost"),
    ("masked(lambda x: moe()(x[:, 1:]))", "mask .* is lost"),
    (
        "masked(lambda x: moe()(keras.layers.Add()([x, keras.Input((5, D))])))",
        "`keras.layers.Add` only if all its inputs have one",
    ),
    ("dense_fitted(callbacks.ExpertMonitor())", "`ExpertMonitor` has nothing to report"),
    ("dense_fitted(callbacks.ExpertHealth())", "`ExpertHealth` has nothing to report"),
    ("masked(lambda x: tasks()(2 * x))", "mask .* is lost"),
]


@on_one_backend
@pytest.mark.parametrize("call, words", WARNED, ids=[call for call, _ in WARNED])
def test_warned(call, words):
    with pytest.warns(UserWarning, match=words) as warned:
        evaluate(call)
    assert len([each for each in warned if each.category is UserWarning]) == 1


class OtherName(routers.TopKRouter):
    """A router whose number of experts has another name."""

    def __init__(self, number=None, **kwargs):
        super().__init__(number, **kwargs)

    def get_config(self):
        config = super().get_config()
        return {"number": config.pop("num_experts"), **config}


TRUE = np.bool_(True)
LIST = [[1, 1, 1, 0, 0]] * 2
TAKEN = [
    "layers.MoE.from_config(layers.MoE(num_experts=E, hidden_dim=8).get_config())",
    "bank(np.int64(E), use_bias=TRUE)",
    "layers.GatedExperts(np.array(4), np.array(8), output_dim=np.int8(3), use_bias=TRUE)",
    "layers.Capacity(np.float32(1.5), per_sequence=TRUE)",
    "routers.TopKRouter(np.int32(E), np.int8(2), renormalize=TRUE, temperature=np.array(2.0))",
    "layers.TransformerDecoderBlock(2, dense(), cross_attention=TRUE, rotary=TRUE)",
    "moe(shared_expert=dense(), gated_shared_expert=TRUE, capacity_factor=np.float32(2))",
    "losses.MixtureNegativeLogLikelihood(scale=np.float32(0.5), normalized=TRUE)",
    "moe(top_k=1)",
    "moe()(X, mask=LIST, training=1)",
    "masked(lambda x: moe()(x))",
    "masked(lambda x: moe()(2 * x, mask=keras.Input((5,), dtype='bool')))",
    "masked(lambda x: moe()(keras.layers.GlobalAveragePooling1D()(2 * x)))",
    "moe()(X, np.asarray(LIST))",
    "moe()(X, indices=[[0, 1]] * 10)",
    "moe()(X, router_inputs=X.tolist())",
    "ids_layer()(X, token_ids=LIST)",
    "ids_layer()(keras.Input((5, D)), None, None, None, keras.Input((5,), dtype='int32'))",
    "moe(bank(kernel_initializer=lambda s, dtype: kops.ones(s)))(X)",
    "moe(bank(activation=keras.layers.LeakyReLU(0.1)))(X)",
    "moe(router=routers.CosineRouter(E, kernel_initializer=lambda s, dtype: kops.ones(s)))(X)",
    "moe(bank(1))(X)",
    "moe(shared_expert=dense(dtype='bfloat16'))(X)",
    "layers.TransformerEncoderBlock(2, moe()).build(np.array([2, 5, D]))",
    "layers.GatedFeedForward(8).build(np.array([2, 5, D]))",
    "decoder(True).make_cache(2, 5, normal(2, 3, D).tolist(), [[1, 1, 0]] * 2)",
    "replay([[0, 1]] * 10), replay(kops.convert_to_tensor(ints(10, 2)))",
    "likelihood(normal(6), (6, 3, 2))",
    "likelihood(ints(6, 1), distribution='categorical')",
    "ops.top_k_routing(normal(T, E).tolist(), 2, [True] * T)",
    "surgery.prune_experts(model(router=OtherName()), keep=np.float32(0.5), by=[4, 3, 2, 1])",
    "callbacks.RouterLossSchedule(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9))",
    "tuner.SearchSpace(np.array([64, 128]), num_experts=range(4, 9, 2))",
]


@on_one_backend
def test_top_k_is_the_default_routers():
    layer = moe(top_k=1)
    again = layers.MixtureOfExperts.from_config(layer.get_config())
    assert layer.router.top_k == again.router.top_k == again.top_k == 1


@on_one_backend
@pytest.mark.parametrize("call", TAKEN)
def test_taken(call):
    made = evaluate(call)
    if hasattr(made, "get_config"):
        json.dumps(made.get_config())


@pytest.mark.backends("torch", "jax")
def test_modules_of_the_framework_are_experts():
    if BACKEND == "torch":
        import torch

        each = [keras.layers.TorchModuleWrapper(torch.nn.Linear(D, D)) for _ in range(4)]
    else:

        def apply(params, inputs):
            return inputs @ params

        each = [keras.layers.JaxLayer(apply, lambda rng, inputs: t(D, D)) for _ in range(4)]
    layer = moe(layers.LayerExperts(each[:3]), shared_expert=each[3])
    made = keras.Sequential([layer])
    made.compile("sgd", "mse")
    before = kops.convert_to_numpy(layer(X))
    made.fit(X, X + 1, verbose=0)
    assert np.abs(kops.convert_to_numpy(layer(X)) - before).max() > 1e-6
