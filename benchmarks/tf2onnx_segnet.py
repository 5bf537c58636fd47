"""A small SegNet of Keras with argmax pooling as a file of tf2onnx, for `poolskip rewrite`.

In an environment of its own: pip install tensorflow-cpu==2.15.1 tf2onnx==1.16.1 'onnx<1.17' onnxruntime
python benchmarks/tf2onnx_segnet.py segnet.onnx [--batch-in-index] [--coordinates] [--size 224 224]
"""

import argparse

import numpy as np
import onnxruntime
import tensorflow as tf
import tf2onnx

layers = tf.keras.layers


class Unpool(layers.Layer):
    """Values to the places that tf.nn.max_pool_with_argmax gave, in a map as large as another."""

    def __init__(self, batch_in_index, coordinates):
        super().__init__()
        self.batch_in_index, self.coordinates = batch_in_index, coordinates

    def call(self, inputs):
        values, places, like = inputs
        shape = tf.shape(like, out_type=tf.int64)
        n, h, w, c = tf.unstack(shape)
        batch = tf.reshape(tf.range(n), [-1, 1, 1, 1])
        if self.coordinates:
            places %= h * w * c
            ones = tf.ones_like(places)
            places = tf.stack([ones * batch, places // (w * c), places // c % w, ones * tf.range(c)])
            unpooled = tf.scatter_nd(tf.transpose(tf.reshape(places, [4, -1])), tf.reshape(values, [-1]), shape)
        else:
            places = places if self.batch_in_index else places + batch * h * w * c
            size = tf.reshape(tf.reduce_prod(shape), [1])
            unpooled = tf.reshape(tf.scatter_nd(tf.reshape(places, [-1, 1]), tf.reshape(values, [-1]), size), shape)
        unpooled.set_shape(like.shape)
        return unpooled


def segnet(size, batch_in_index, coordinates, widths=(32, 64, 128)):
    """Encoder and decoder with crossing pairs."""
    x = image = layers.Input((*size, 3))
    pairs = []
    for width in widths:
        x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(x)))
        pooled, places = layers.Lambda(
            lambda y: tf.nn.max_pool_with_argmax(y, 2, 2, "SAME", include_batch_in_index=batch_in_index)
        )(x)
        pairs.append((places, x))
        x = pooled
    for places, like in reversed(pairs):
        x = layers.ReLU()(layers.Conv2D(like.shape[-1], 3, padding="same")(x))
        x = Unpool(batch_in_index, coordinates)([x, places, like])
    return tf.keras.Model(image, layers.Conv2D(5, 1)(x))


def main():
    """Write the file and compare it with Keras."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--batch-in-index", action="store_true", help="include_batch_in_index of the pooling")
    parser.add_argument("--coordinates", action="store_true", help="scatter by four coordinates, not by flat places")
    parser.add_argument("--size", nargs=2, type=int, default=(224, 224), metavar=("H", "W"))
    args = parser.parse_args()
    model = segnet(args.size, args.batch_in_index, args.coordinates)
    tf2onnx.convert.from_keras(model, opset=17, output_path=args.path)
    x = np.random.default_rng(0).standard_normal((2, *args.size, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(args.path, providers=["CPUExecutionProvider"])
    difference = np.abs(session.run(None, {session.get_inputs()[0].name: x})[0] - model(x).numpy()).max()
    print(f"{args.path}: largest difference to Keras {difference:.1e}")


if __name__ == "__main__":
    main()
