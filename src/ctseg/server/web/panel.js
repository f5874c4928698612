/** What the page shows around the picture. */

const CROSS_GAP = 16; // pixels between the middle of the crosshair and its lines

export const element = (id) => document.getElementById(id);

export const PRESETS = {
  'Soft tissue': { level: 40, width: 400 },
  Liver: { level: 70, width: 180 },
  Mediastinum: { level: 40, width: 350 },
  Lung: { level: -600, width: 1500 },
  Bone: { level: 400, width: 1800 },
  Brain: { level: 40, width: 80 },
};

/** Says what goes on; nothing goes on without a text. */
export function showBusy(text) {
  element('busy').hidden = !text;
  element('busy').querySelector('span').textContent = text;
}

export function showError(text) {
  element('error').hidden = !text;
  element('error').querySelector('span').textContent = text;
}

export function showStatus(text) {
  element('status').textContent = text;
}

/** Fills the list of images, where a tick marks those with a final label, and the names that labels have so far. */
export function showImages({ images, structures }, chosen) {
  const rows = images.map((image) => [image.id, hasFinal(image) ? `${image.id} ✓` : image.id]);
  fill(element('image'), [['', images.length ? 'Choose an image' : 'No image yet'], ...rows], chosen);
  element('known-labels').replaceChildren(...Object.keys(structures).map((name) => new Option(name)));
}

export const hasFinal = ({ labels }) => labels.some(({ tag }) => tag === 'final');

export function showModels(models) {
  const rows = models.map(({ name, kind }) => [name, kind === 'clicks' ? name : `${name} (automatic)`]);
  const first = models.find(({ kind }) => kind === 'clicks') ?? models[0];
  fill(element('model'), rows.length ? rows : [['', 'No model is served']], element('model').value || first?.name);
}

export function showPresets() {
  fill(element('preset'), [...Object.keys(PRESETS).map((name) => [name, name]), ['', 'Own']], 'Soft tissue');
}

function fill(select, rows, chosen) {
  select.replaceChildren(...rows.map(([value, text]) => new Option(text, value)));
  if (rows.some(([value]) => value === chosen)) select.value = chosen;
}

/** The window of the two number fields. */
export function chosenWindow() {
  return { level: Number(element('level').value), width: Math.max(1, Number(element('width').value)) };
}

/** Shows the numbers of a window, and its name where it is a preset. */
export function showWindow({ level, width }) {
  const preset = Object.entries(PRESETS).find(([, one]) => one.level === level && one.width === width);
  element('preset').value = preset ? preset[0] : '';
  element('level').value = level;
  element('width').value = width;
}

export function showPlanes(name) {
  for (const button of document.querySelectorAll('[data-plane]')) {
    button.ariaPressed = String(button.dataset.plane === name);
  }
}

/** Lists clicks, marks them in the planes that show their voxel, and draws the crosshair. */
export function showClicks(clicks, viewer) {
  element('clicks').replaceChildren(...clicks.map(clickRow));
  const marks = viewer.places(clicks.map(({ shown }) => shown)).map(({ index, x, y }) => mark(clicks[index].positive, x, y));
  element('marks').replaceChildren(...viewer.crosses().flatMap(cross), ...marks);
}

function clickRow({ voxel, positive }) {
  const row = document.createElement('li');
  const sign = document.createElement('b');
  sign.className = positive ? 'plus' : 'minus';
  sign.textContent = positive ? '+' : '−';
  row.append(sign, voxel.join(', '));
  return row;
}

function mark(positive, x, y) {
  return drawn('circle', { cx: x, cy: y, r: 4.5, class: positive ? 'plus' : 'minus' });
}

/** Four lines that leave the middle free. */
function cross({ x, y, left, top, right, bottom }) {
  const ends = [
    [left, y, x - CROSS_GAP, y], [x + CROSS_GAP, y, right, y], [x, top, x, y - CROSS_GAP], [x, y + CROSS_GAP, x, bottom],
  ];
  return ends.filter(([x1, y1, x2, y2]) => x2 > x1 || y2 > y1).map(([x1, y1, x2, y2]) => drawn('line', { x1, y1, x2, y2 }));
}

function drawn(kind, attributes) {
  const shape = document.createElementNS('http://www.w3.org/2000/svg', kind);
  for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  return shape;
}

export function showLocation(viewer) {
  const { crosshair } = viewer;
  const inside = viewer.isMasked(crosshair) ? ' · in the mask' : '';
  const text = `Voxel ${viewer.voxel(crosshair).join(', ')} · ${Math.round(viewer.value(crosshair))} HU${inside}`;
  element('location').textContent = text.replace('-', '−');
}
