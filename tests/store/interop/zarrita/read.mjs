// Reads arrays of a Zarr group with zarrita and prints them as JSON: node read.mjs GROUP ARRAY...
// Floats as the bits of each value, since JSON has neither NaN nor -0. What it refuses is printed as {error}.
import { FileSystemStore } from "@zarrita/storage";
import * as zarr from "zarrita";

const [path, ...names] = process.argv.slice(2);
const store = await zarr.withConsolidatedMetadata(new FileSystemStore(path), { format: "v3" });
const group = await zarr.open(zarr.root(store), { kind: "group" });

async function read(name) {
  const array = await zarr.open(group.resolve(name), { kind: "array" });
  const { data, shape } = await zarr.get(array);
  const values = array.dtype === "float32" ? new Uint32Array(data.slice().buffer) : data;
  return { dtype: array.dtype, dimensions: array.dimensionNames, shape, values: Array.from(values) };
}

async function readLayer(name, layer) {
  const array = await zarr.open(group.resolve(name), { kind: "array" });
  const { data } = await zarr.get(array, [null, layer, null]);
  return Array.from(new Uint32Array(data.slice().buffer));
}

const arrays = {};
for (const name of names) {
  arrays[name] = await read(name).catch((error) => ({ error: String(error) }));
}
const contents = store.contents().map(({ path }) => path).sort();
const layer4 = await readLayer("resid_post_mean", 4);
console.log(JSON.stringify({ contents, attributes: group.attrs, arrays, layer4 }));
