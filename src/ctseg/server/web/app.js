/** The annotation page: opens images, sends clicks in their order, shows the mask, saves it. */

import { bytes, forget, json } from './api.js';
import { listen } from './controls.js';
import { openViewer } from './viewer.js';

const element = (id) => document.getElementById(id);
const PRESETS = {
  'Soft tissue': { level: 40, width: 400 },
  Liver: { level: 70, width: 180 },
  Mediastinum: { level: 40, width: 350 },
  Lung: { level: -600, width: 1500 },
  Bone: { level: 400, width: 1800 },
  Brain: { level: 40, width: 80 },
};

const state = {
  viewer: null,
  models: [],
  image: '', // its id
  session: null,
  clicks: [], // {shown, voxel, positive}, also those on their way to the server
  unsaved: false,
};
let work = Promise.resolve();
let waiting = 0;

/** Runs one task after the other, says what goes on, and tells what went wrong. */
function enqueue(text, task) {
  waiting += 1;
  work = work.then(async () => {
    showBusy(text);
    try {
      await task();
    } catch (problem) {
      showError(problem.message);
    }
    waiting -= 1;
    if (!waiting) showBusy('');
    render();
  });
  return work;
}

function showBusy(text) {
  element('busy').hidden = !text;
  element('busy').querySelector('span').textContent = text;
  document.body.ariaBusy = String(Boolean(text));
}

function showError(text) {
  element('error').hidden = !text;
  element('error').querySelector('span').textContent = text;
}

function showStatus(text) {
  element('status').textContent = text;
}

async function start() {
  for (const name of Object.keys(PRESETS)) element('preset').add(new Option(name));
  element('preset').add(new Option('Own', '', false, false));
  wire();
  try {
    state.viewer = await openViewer(element('canvas'));
  } catch (problem) {
    element('empty').hidden = true;
    element('missing').hidden = !/import|module/i.test(problem.message);
    showError(element('missing').hidden ? `The viewer cannot start: ${problem.message}` : '');
    return;
  }
  listen(element('canvas'), state.viewer, actions, render);
  new ResizeObserver(() => requestAnimationFrame(render)).observe(element('canvas'));
  await enqueue('Asking the server…', refreshLists);
}

async function refreshLists() {
  const [models, images] = [await json('GET', '/api/models'), await json('GET', '/api/images')];
  state.models = models;
  fill(element('model'), models.map((model) => [model.name, model.name]), 'No model');
  showImages(images);
}

function showImages(images) {
  const rows = images.map(({ id, labels }) => [id, labels.some(({ tag }) => tag === 'final') ? `${id} ✓` : id]);
  fill(element('image'), [['', images.length ? 'Choose an image' : 'No image yet'], ...rows], '');
  element('image').value = state.image;
}

function fill(select, rows, empty) {
  const chosen = select.value;
  select.replaceChildren(...(rows.length ? rows : [['', empty]]).map(([value, text]) => new Option(text, value)));
  if (rows.some(([value]) => value === chosen)) select.value = chosen;
}

/** Ends what was being done on the open image. */
function leave() {
  if (state.session) forget(`/api/sessions/${state.session}`);
  Object.assign(state, { session: null, clicks: [], unsaved: false });
  state.viewer.clearMask();
}

function mayLeave() {
  return !state.unsaved || window.confirm('The mask is not saved. Go on without it?');
}

async function openImage(id) {
  if (!mayLeave()) {
    element('image').value = state.image;
    return;
  }
  leave();
  state.image = id;
  await enqueue('Loading the image…', async () => {
    if (state.image !== id) return;
    state.viewer.close();
    if (id) await state.viewer.open(await bytes('GET', `/api/images/${encodeURIComponent(id)}/file`), chosenWindow());
    showStatus('');
    element('canvas').focus({ preventScroll: true });
  });
}

async function upload(file) {
  const form = new FormData();
  form.append('file', file, file.name);
  let added = null;
  await enqueue(`Sending ${file.name}…`, async () => {
    added = (await json('POST', '/api/images', form)).id;
    showImages(await json('GET', '/api/images'));
  });
  if (added === null) return;
  element('image').value = added;
  await openImage(added);
}

function chosenModel() {
  return state.models.find(({ name }) => name === element('model').value);
}

const takesClicks = () => chosenModel()?.type === 'deepgrow';

function click(shown, positive) {
  if (!state.image || !takesClicks()) {
    showError('Choose a model that takes clicks first.');
    return;
  }
  const one = { shown, voxel: state.viewer.voxel(shown), positive };
  const { image } = state;
  state.clicks.push(one);
  render();
  enqueue('Segmenting…', async () => {
    if (state.image !== image || !state.clicks.includes(one)) return;
    try {
      state.session ??= (await json('POST', '/api/sessions', { image, model: element('model').value })).session;
      const path = `/api/sessions/${state.session}/clicks`;
      await showMask(await bytes('POST', path, { position: one.voxel, positive, coordinates: 'voxel' }), image);
    } catch (problem) {
      state.clicks = state.clicks.filter((other) => other !== one);
      if (problem.status === 404 && state.session) endedSession();
      throw problem;
    }
  });
}

function endedSession() {
  Object.assign(state, { session: null, clicks: [], unsaved: false });
  state.viewer.clearMask();
}

async function showMask(buffer, image) {
  if (state.image !== image) return;
  await state.viewer.setMask(buffer);
  state.unsaved = true;
  showError('');
}

function undo() {
  enqueue('Undoing…', async () => {
    if (!state.clicks.length) return;
    const mask = await bytes('POST', `/api/sessions/${state.session}/undo`);
    state.clicks.pop();
    if (state.clicks.length) await showMask(mask, state.image);
    else clearMask();
  });
}

function reset() {
  enqueue('Resetting…', async () => {
    if (state.session) await bytes('POST', `/api/sessions/${state.session}/reset`);
    state.clicks = [];
    clearMask();
  });
}

function clearMask() {
  state.viewer.clearMask();
  state.unsaved = false;
}

function segment() {
  const { image } = state;
  const model = element('model').value;
  enqueue('Segmenting the image…', async () => {
    await showMask(await bytes('POST', '/api/segment', { image, model }), image);
  });
}

function save() {
  const label = element('label').value.trim();
  if (!label || !state.session) {
    element('label').focus();
    return;
  }
  enqueue('Saving…', async () => {
    await json('POST', `/api/sessions/${state.session}/save`, { label, tag: 'final' });
    state.unsaved = false;
    showStatus(`Saved “${label}” as the final label of ${state.image}.`);
    showImages(await json('GET', '/api/images'));
  });
}

function chosenWindow() {
  return { level: Number(element('level').value), width: Math.max(1, Number(element('width').value)) };
}

/** Shows a window and its numbers; the preset's name where it is one. */
function setWindow({ level, width }) {
  const preset = Object.entries(PRESETS).find(([, one]) => one.level === level && one.width === width);
  element('preset').value = preset ? preset[0] : '';
  element('level').value = level;
  element('width').value = width;
  state.viewer?.setWindow({ level, width });
}

function nextPreset() {
  const names = Object.keys(PRESETS);
  setWindow(PRESETS[names[(names.indexOf(element('preset').value) + 1) % names.length]]);
}

function setPlanes(name) {
  for (const button of document.querySelectorAll('[data-plane]')) {
    button.ariaPressed = String(button.dataset.plane === name);
  }
  state.viewer?.setPlanes(name);
  render();
}

function toggleMask() {
  state.viewer.setOpacity(state.viewer.opacity ? 0 : Number(element('opacity').value) / 100);
}

function showHelp() {
  element('help').showModal();
}

const actions = {
  click, undo, reset, save, setPlanes, setWindow, chosenWindow, nextPreset, toggleMask, showHelp,
  canUndo: () => state.clicks.length > 0,
};

/** Brings everything but the picture itself up to date. */
function render() {
  const isOpen = Boolean(state.viewer?.image);
  element('empty').hidden = isOpen || !state.viewer || waiting > 0;
  element('undo').disabled = element('reset').disabled = !state.clicks.length;
  element('save').disabled = !state.unsaved || !state.session;
  element('segment').hidden = takesClicks() || !chosenModel();
  element('segment').disabled = !isOpen;
  element('how').hidden = !takesClicks();
  element('clicks').replaceChildren(...state.clicks.map(clickRow));
  element('marks').replaceChildren(...(isOpen ? state.viewer.places(state.clicks.map(({ shown }) => shown)) : []).map(mark));
  element('location').textContent = isOpen ? location(state.viewer.crosshair) : '';
}

function clickRow({ voxel, positive }) {
  const row = document.createElement('li');
  const sign = document.createElement('b');
  sign.className = positive ? 'plus' : 'minus';
  sign.textContent = positive ? '+' : '−';
  row.append(sign, voxel.join(', '));
  return row;
}

function mark({ index, x, y }) {
  const circle = document.createElementNS('http://www.w3.org/2000/svg', 'circle');
  circle.setAttribute('cx', x);
  circle.setAttribute('cy', y);
  circle.setAttribute('r', 4.5);
  circle.setAttribute('class', state.clicks[index].positive ? 'plus' : 'minus');
  return circle;
}

function location(shown) {
  const inside = state.viewer.isMasked(shown) ? ' · in the mask' : '';
  return `Voxel ${state.viewer.voxel(shown).join(', ')} · ${Math.round(state.viewer.value(shown))} HU${inside}`;
}

function wire() {
  element('image').addEventListener('change', (event) => openImage(event.target.value));
  element('upload-button').addEventListener('click', () => element('upload').click());
  element('upload').addEventListener('change', ({ target }) => {
    if (target.files.length) upload(target.files[0]);
    target.value = '';
  });
  element('model').addEventListener('change', () => { leave(); render(); });
  element('segment').addEventListener('click', segment);
  element('undo').addEventListener('click', undo);
  element('reset').addEventListener('click', reset);
  element('save-form').addEventListener('submit', (event) => { event.preventDefault(); save(); });
  element('preset').addEventListener('change', ({ target }) => setWindow(PRESETS[target.value] ?? chosenWindow()));
  for (const id of ['level', 'width']) element(id).addEventListener('change', () => setWindow(chosenWindow()));
  element('opacity').addEventListener('input', ({ target }) => state.viewer?.setOpacity(target.value / 100));
  for (const button of document.querySelectorAll('[data-plane]')) {
    button.addEventListener('click', () => setPlanes(button.dataset.plane));
  }
  element('help-button').addEventListener('click', showHelp);
  element('error').querySelector('button').addEventListener('click', () => showError(''));
  wireDrop();
  window.addEventListener('beforeunload', (event) => { if (state.unsaved) event.preventDefault(); });
  window.addEventListener('pagehide', () => { if (state.session) forget(`/api/sessions/${state.session}`); });
}

function wireDrop() {
  const veil = element('drop');
  window.addEventListener('dragover', (event) => { event.preventDefault(); veil.hidden = false; });
  window.addEventListener('dragleave', (event) => { if (!event.relatedTarget) veil.hidden = true; });
  window.addEventListener('drop', (event) => {
    event.preventDefault();
    veil.hidden = true;
    const files = [...event.dataTransfer.files];
    if (files.length === 1 && state.viewer) upload(files[0]);
    else showError('Drop one NIfTI or NRRD file at a time.');
  });
}

start();
