// Reads arrays of a Zarr group with zarrita and prints them as JSON: node read.mjs GROUP ARRAY...
// Floats as the bits of each value, since JSON has neither NaN nor -0. A failure is printed as {error}.
import { FileSystemStore } from "@zarrita/storage";
import * as zarr from "zarrita";

const [path, ...names] = process.argv.slice(2);

async function read(name) {
  const group = await zarr.open(zarr.root(new FileSystemStore(path)), { kind: "group" });
  const array = await zarr.open(group.resolve(name), { kind: "array" });
  const whole = await zarr.get(array);
  const data = array.dtype === "float32" ? new Uint32Array(whole.data.slice().buffer) : whole.data;
  return { dtype: array.dtype, shape: whole.shape, dimensions: array.dimensionNames, data: Array.from(data) };
}

const found = {};
for (const name of names) {
  found[name] = await read(name).catch((error) => ({ error: String(error) }));
}
console.log(JSON.stringify(found));
