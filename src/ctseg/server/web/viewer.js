/**
 * Three planes of one CT, a mask over them, and the voxel under a point: all that the page asks of NiiVue.
 *
 * NiiVue shows every image with its axes turned towards right, front, head. `shown` is a voxel in that order,
 * `voxel` one in the file's own order, which is what the server takes.
 */

const PLANES = ['axial', 'coronal', 'sagittal'];
const BESIDE = [[0, 0, 0.62, 1], [0.625, 0, 0.375, 0.495], [0.625, 0.505, 0.375, 0.495]]; // left, top, width, height
const BELOW = [[0, 0, 1, 0.62], [0, 0.63, 0.495, 0.37], [0.505, 0.63, 0.495, 0.37]];
const NORMALS = [2, 1, 0]; // the axis of `shown` that each plane looks along
const ACROSS = [[0, 1], [0, 2], [1, 2]]; // the axes of `shown` that run to the right and up in it
const COLOURS = { // of label values 1 to 6; others are red
  R: [0, 255, 70, 255, 190, 60, 255],
  G: [0, 82, 160, 200, 120, 200, 140],
  B: [0, 70, 255, 60, 255, 120, 190],
  A: [0, 255, 255, 255, 255, 255, 255],
  I: [0, 1, 2, 3, 4, 5, 6],
  labels: ['', '1', '2', '3', '4', '5', '6'],
};

/** The viewer on `canvas`; fails where the library is missing or the browser has no WebGL 2. */
export async function openViewer(canvas) {
  const { Niivue } = await import('./vendor/niivue.js');
  const niivue = new Niivue({
    logLevel: 'error',
    interactive: false, // the page has its own mouse and keys
    backColor: [0, 0, 0, 1],
    crosshairWidth: 0, // the page draws its own, which does not grow with the zoom
    fontColor: [0.6, 0.65, 0.71, 1],
    fontSizeScaling: 0.3,
    isRadiologicalConvention: true,
    sagittalNoseLeft: true,
    maxDrawUndoBitmaps: 0,
    loadingText: '',
  });
  await niivue.attachToCanvas(canvas, false);
  niivue.setDrawColormap(COLOURS);
  const viewer = new Viewer(niivue, canvas);
  viewer.setPlanes('all');
  viewer.setOpacity(viewer.opacity);
  return viewer;
}

class Viewer {
  constructor(niivue, canvas) {
    this.niivue = niivue;
    this.canvas = canvas;
    this.opacity = 0.4;
    this.masked = false;
    this.drawn = () => {}; // called when the picture has changed
    this.frame = 0;
    this.rewindow = false;
  }

  /** Draws once, however much has changed, when the browser is ready for it. */
  draw() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      if (this.rewindow) this.niivue.updateGLVolume();
      this.rewindow = false;
      this.niivue.drawScene();
      this.drawn();
    });
  }

  /** The open image, or undefined. */
  get image() {
    return this.niivue.volumes[0];
  }

  /** Shows a NIfTI file instead of what was open. */
  async open(buffer, { level, width }) {
    this.close();
    const range = { cal_min: level - width / 2, cal_max: level + width / 2 };
    await this.niivue.addVolumeFromUrl({ url: 'image.nii.gz', name: 'image.nii.gz', buffer, colormap: 'gray', ...range });
    this.fit();
    this.moveTo(this.image.dimsRAS.slice(1, 4).map((n) => Math.floor(n / 2)));
  }

  close() {
    this.clearMask();
    if (this.image) this.niivue.removeVolume(this.image);
  }

  /** Shows the Hounsfield units of a window. */
  setWindow({ level, width }) {
    if (!this.image) return;
    this.image.cal_min = level - width / 2;
    this.image.cal_max = level + width / 2;
    this.rewindow = true;
    this.draw();
  }

  /** Shows one plane by its name, or all three: the axial one large, the others where there is room. */
  setPlanes(name) {
    const isWide = this.canvas.clientWidth > this.canvas.clientHeight;
    const all = (isWide ? BESIDE : BELOW).map((position, sliceType) => ({ sliceType, position }));
    const one = { sliceType: PLANES.indexOf(name), position: [0, 0, 1, 1] };
    this.niivue.setCustomLayout(name === 'all' ? all : [one]);
    this.drawn();
  }

  setOpacity(share) {
    this.opacity = share;
    this.niivue.drawRimOpacity = Math.min(1, share * 2);
    this.niivue.setDrawOpacity(share);
    this.drawn();
  }

  /** Lays a mask of the same grid on the image. */
  setMask({ size, voxels }) {
    if (size.some((n, axis) => n !== this.image.hdr.dims[axis + 1])) throw new Error('The mask is not on the grid of the image.');
    if (!this.masked) this.niivue.createEmptyDrawing();
    this.masked = true;
    reorder(voxels, this.image, this.niivue.drawBitmap);
    this.niivue.refreshDrawing(false);
    this.draw();
  }

  clearMask() {
    if (!this.masked) return;
    this.masked = false;
    this.niivue.closeDrawing();
    this.draw();
  }

  /** Whether a voxel belongs to the mask. */
  isMasked(shown) {
    const [, nx, ny] = this.image.dimsRAS;
    return this.masked && this.niivue.drawBitmap[shown[0] + nx * (shown[1] + ny * shown[2])] > 0;
  }

  /** The voxel under a point of the page, in shown order, and the plane it was seen in; null outside. */
  at(clientX, clientY) {
    if (!this.image) return null;
    const [x, y] = this.#pixels(clientX, clientY);
    const plane = this.niivue.tileIndex(x, y);
    const share = this.niivue.canvasPos2frac([x, y]);
    if (plane < 0 || share[0] < 0) return null;
    const shown = [...share].map((part, axis) => {
      const count = this.image.dimsRAS[axis + 1];
      return Math.min(count - 1, Math.max(0, Math.floor(part * count)));
    });
    return { shown, plane: this.niivue.screenSlices[plane].axCorSag };
  }

  /** The crosshair's voxel, in shown order. */
  get crosshair() {
    return [...this.niivue.scene.crosshairPos].map((part, axis) => Math.floor(part * this.image.dimsRAS[axis + 1]));
  }

  moveTo(shown) {
    const counts = this.image.dimsRAS.slice(1, 4);
    const inside = shown.map((index, axis) => Math.min(counts[axis] - 1, Math.max(0, index)));
    this.niivue.scene.crosshairPos = inside.map((index, axis) => (index + 0.5) / counts[axis]);
    this.draw();
  }

  /** Moves the crosshair by `steps` voxels along the axis that `plane` looks along. */
  scroll(plane, steps) {
    const shown = this.crosshair;
    shown[NORMALS[plane]] += steps;
    this.moveTo(shown);
  }

  /** The same voxel in the file's order. */
  voxel(shown) {
    const voxel = [0, 0, 0];
    this.image.permRAS.forEach((axis, n) => {
      const own = Math.abs(axis) - 1;
      voxel[own] = axis > 0 ? shown[n] : this.image.hdr.dims[own + 1] - 1 - shown[n];
    });
    return voxel;
  }

  /** The value of a voxel, in HU for CT. */
  value(shown) {
    const { img, img2RASstart: start, img2RASstep: step, hdr } = this.image;
    const stored = img[shown.reduce((sum, index, axis) => sum + start[axis] + index * step[axis], 0)];
    return hdr.scl_slope ? stored * hdr.scl_slope + hdr.scl_inter : stored;
  }

  /** Enlarges all planes by `factor`; the voxel `shown`, or the crosshair, stays where it is. */
  zoom(factor, shown = this.crosshair) {
    const view = this.niivue.scene.pan2Dxyzmm;
    const after = Math.min(20, Math.max(1, view[3] * factor));
    const fixed = this.#millimetres(shown);
    const moved = [0, 1, 2].map((axis) => view[axis] + (view[3] - after) * fixed[axis]);
    this.niivue.scene.pan2Dxyzmm = after === 1 ? [0, 0, 0, 1] : [...moved, after];
    this.draw();
  }

  /** Moves the picture in one plane by so many pixels of the page. */
  pan(plane, x, y) {
    const slice = this.niivue.screenSlices.find((one) => one.axCorSag === plane);
    const view = [...this.niivue.scene.pan2Dxyzmm];
    const [, , width, height] = slice.leftTopWidthHeight;
    const [right, up] = ACROSS[plane];
    view[right] += (view[3] * x * this.#ratio() * slice.fovMM[0]) / width;
    view[up] -= (view[3] * y * this.#ratio() * slice.fovMM[1]) / height;
    this.niivue.scene.pan2Dxyzmm = view;
    this.draw();
  }

  fit() {
    this.niivue.scene.pan2Dxyzmm = [0, 0, 0, 1];
    this.draw();
  }

  /** Where voxels lie on the page's canvas, in each plane whose slice shows them: {index, x, y}. */
  places(shownVoxels) {
    if (!this.image) return [];
    const { crosshair } = this;
    return this.#slices().flatMap((slice) => shownVoxels.flatMap((shown, index) => {
      const normal = NORMALS[slice.axCorSag];
      const place = shown[normal] === crosshair[normal] ? this.#place(shown, slice) : null;
      return place ? [{ index, ...place }] : [];
    }));
  }

  /** Where the crosshair lies in each plane, and the plane's edges: {x, y, left, top, right, bottom}. */
  crosses() {
    if (!this.image) return [];
    const { crosshair } = this;
    return this.#slices().flatMap((slice) => {
      const place = this.#place(crosshair, slice);
      const [x1, y1, width, height] = slice.leftTopWidthHeight.map((length) => length / this.#ratio());
      const edges = { left: Math.min(x1, x1 + width), right: Math.max(x1, x1 + width), top: y1, bottom: y1 + height };
      return place ? [{ ...place, ...edges }] : [];
    });
  }

  #slices() {
    return this.niivue.screenSlices.filter((slice) => slice.axCorSag < PLANES.length);
  }

  #place(shown, slice) {
    const mm = this.#millimetres(shown);
    const [right, up] = ACROSS[slice.axCorSag].map((axis, n) => (mm[axis] - slice.leftTopMM[n]) / slice.fovMM[n]);
    if (Math.min(right, up) < 0 || Math.max(right, up) > 1) return null;
    const [left, top, width, height] = slice.leftTopWidthHeight; // a mirrored plane has a negative width
    return { x: (left + right * width) / this.#ratio(), y: (top + (1 - up) * height) / this.#ratio() };
  }

  #millimetres(shown) {
    return this.niivue.frac2mm(shown.map((n, axis) => (n + 0.5) / this.image.dimsRAS[axis + 1]));
  }

  #pixels(clientX, clientY) {
    const box = this.canvas.getBoundingClientRect();
    const ratio = this.#ratio();
    return [(clientX - box.left) * ratio, (clientY - box.top) * ratio];
  }

  #ratio() {
    return this.canvas.width / this.canvas.clientWidth;
  }
}

/** The size and the bytes of a mask in a NIfTI file, gzipped or not, in the file's order. */
export async function maskOf(buffer) {
  return readMask(await unzipped(buffer));
}

async function unzipped(buffer) {
  const [first, second] = new Uint8Array(buffer, 0, 2);
  if (first !== 0x1f || second !== 0x8b) return buffer;
  return new Response(new Blob([buffer]).stream().pipeThrough(new DecompressionStream('gzip'))).arrayBuffer();
}

function readMask(buffer) {
  const header = new DataView(buffer);
  const isMask = buffer.byteLength >= 352 && header.getInt32(0, true) === 348 && header.getInt16(70, true) === 2;
  if (!isMask) throw new Error('The server sent a mask that this page cannot read.');
  const size = [42, 44, 46].map((at) => header.getInt16(at, true));
  const count = size[0] * size[1] * size[2];
  return { size, voxels: new Uint8Array(buffer, header.getFloat32(108, true), count) };
}

/** Copies voxels from the file's order into the shown order of `image`. */
function reorder(voxels, { dimsRAS, img2RASstart, img2RASstep }, target) {
  const [, nx, ny, nz] = dimsRAS;
  const start = img2RASstart[0] + img2RASstart[1] + img2RASstart[2];
  let to = 0;
  for (let z = 0; z < nz; z += 1) {
    for (let y = 0; y < ny; y += 1) {
      let from = start + y * img2RASstep[1] + z * img2RASstep[2];
      for (let x = 0; x < nx; x += 1) {
        target[to] = voxels[from];
        to += 1;
        from += img2RASstep[0];
      }
    }
  }
}
