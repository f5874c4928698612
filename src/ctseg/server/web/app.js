/** The annotation page: opens images, sends clicks in their order, shows the mask, saves it. */

import { bytes, forget, json } from './requests.js';
import { listen, listenDrop } from './controls.js';
import * as panel from './panel.js';
import { openViewer } from './viewer.js';

const { element } = panel;
const GONE = [404, 440]; // what the server answers of a session that it does not have

const state = {
  viewer: null,
  models: [],
  model: '', // the name of the chosen one
  images: [],
  image: '', // the id of the open one
  session: null,
  clicks: [], // {shown, voxel, positive}, also those on their way to the server
  whole: null, // the label map of an automatic model, as a file
  unsaved: false,
};
let work = Promise.resolve();
let waiting = 0;

/** Runs one task after the other, says what goes on, and tells what went wrong. */
function enqueue(text, task) {
  waiting += 1;
  work = work.then(async () => {
    panel.showBusy(text);
    try {
      await task();
    } catch (problem) {
      if (problem.status !== undefined) panel.showError(problem.message);
      else panel.showError(`Something went wrong in this page: ${problem.message}`);
      if (GONE.includes(problem.status) && problem.path.startsWith('/api/sessions/')) forgetMask();
    }
    waiting -= 1;
    if (!waiting) panel.showBusy('');
    render();
  });
  return work;
}

async function start() {
  panel.showPresets();
  wire();
  try {
    state.viewer = await openViewer(element('canvas'));
  } catch (problem) {
    element('empty').hidden = true;
    element('missing').hidden = !/import|module/i.test(problem.message);
    if (element('missing').hidden) panel.showError(`The viewer cannot start: ${problem.message}`);
    return;
  }
  state.viewer.drawn = render;
  listen(element('canvas'), state.viewer, actions);
  new ResizeObserver(() => requestAnimationFrame(render)).observe(element('canvas'));
  await enqueue('Asking the server…', async () => {
    state.models = await json('GET', '/api/models');
    panel.showModels(state.models);
    state.model = element('model').value;
    await refreshImages();
  });
}

async function refreshImages() {
  const answer = await json('GET', '/api/images');
  state.images = answer.images;
  panel.showImages(answer, state.image);
}

const model = () => state.models.find(({ name }) => name === element('model').value);
const takesClicks = () => model()?.kind === 'clicks';

function mayLeave() {
  return !state.unsaved || window.confirm('The mask is not saved. Go on without it?');
}

/** Ends what was being done on the open image. */
function leave() {
  if (state.session) forget(`/api/sessions/${state.session}`);
  forgetMask();
}

function forgetMask() {
  Object.assign(state, { session: null, clicks: [], whole: null, unsaved: false });
  state.viewer.clearMask();
}

async function openImage(id) {
  if (!mayLeave()) {
    element('image').value = state.image;
    return;
  }
  leave();
  state.image = id;
  panel.showStatus('');
  await enqueue('Loading the image…', async () => {
    if (state.image !== id) return;
    state.viewer.close();
    if (id) await state.viewer.open(await bytes('GET', `/api/images/${encodeURIComponent(id)}/file`), panel.chosenWindow());
    element('canvas').dataset.image = id;
    element('canvas').focus({ preventScroll: true });
  });
}

function chooseModel() {
  if (mayLeave()) {
    state.model = element('model').value;
    leave();
  } else {
    element('model').value = state.model;
  }
  render();
}

async function upload(file) {
  const form = new FormData();
  form.append('file', file, file.name);
  let added = null;
  await enqueue(`Sending ${file.name}…`, async () => {
    added = (await json('POST', '/api/images', form)).id;
    await refreshImages();
  });
  if (added === null) return;
  element('image').value = added;
  await openImage(added);
}

function click(shown, positive) {
  if (!takesClicks()) {
    panel.showError('This model takes no clicks; choose one that does.');
    return;
  }
  const { image } = state;
  const { name } = model();
  const one = { shown, voxel: state.viewer.voxel(shown), positive };
  state.clicks.push(one);
  enqueue('Segmenting…', async () => {
    if (!state.clicks.includes(one)) return; // another image or model since then
    try {
      state.session ??= (await json('POST', '/api/sessions', { image, model: name })).session;
      const path = `/api/sessions/${state.session}/clicks`;
      await showMask(await bytes('POST', path, { position: one.voxel, positive, coordinates: 'voxel' }), one);
    } catch (problem) {
      state.clicks = state.clicks.filter((other) => other !== one);
      throw problem;
    }
  });
}

/** Shows what the server made of a click, unless that was left in the meantime. */
async function showMask(mask, one) {
  if (!state.clicks.includes(one)) return;
  await state.viewer.setMask(mask);
  state.unsaved = true;
  panel.showStatus('');
  panel.showError('');
}

function undo() {
  enqueue('Undoing…', async () => {
    if (!state.session || !state.clicks.length) return;
    const mask = await bytes('POST', `/api/sessions/${state.session}/undo`);
    state.clicks.pop();
    if (state.clicks.length) await showMask(mask, state.clicks[0]);
    else clearMask();
  });
}

function reset() {
  enqueue('Removing all clicks…', async () => {
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
  const { name } = model();
  enqueue('Segmenting the image…', async () => {
    const labels = await bytes('POST', '/api/segment', { image, model: name });
    if (state.image !== image || model()?.name !== name) return;
    await state.viewer.setMask(labels);
    Object.assign(state, { whole: labels, unsaved: true });
    panel.showError('');
  });
}

function save() {
  if (state.whole) saveWhole();
  else if (state.session && element('save-form').reportValidity()) saveStructure(element('label').value.trim());
}

function saveStructure(label) {
  enqueue('Saving…', async () => {
    await json('POST', `/api/sessions/${state.session}/save`, { label, tag: 'final' });
    await saved(`Saved “${label}” in the final label of ${state.image}.`);
  });
}

function saveWhole() {
  const isThere = state.images.some((image) => image.id === state.image && panel.hasFinal(image));
  if (isThere && !window.confirm('This image has a final label already. Put it aside and save this one?')) return;
  const form = new FormData();
  form.append('file', new Blob([state.whole]), 'label.nii.gz');
  enqueue('Saving…', async () => {
    await json('PUT', `/api/images/${encodeURIComponent(state.image)}/labels/final`, form);
    await saved(`Saved the final label of ${state.image}.`);
  });
}

async function saved(text) {
  state.unsaved = false;
  panel.showStatus(text);
  await refreshImages();
}

function setWindow(window) {
  panel.showWindow(window);
  state.viewer?.setWindow(window);
}

function nextPreset() {
  const names = Object.keys(panel.PRESETS);
  setWindow(panel.PRESETS[names[(names.indexOf(element('preset').value) + 1) % names.length]]);
}

function setPlanes(name) {
  panel.showPlanes(name);
  state.viewer?.setPlanes(name);
}

function toggleMask() {
  state.viewer.setOpacity(state.viewer.opacity ? 0 : Number(element('opacity').value) / 100);
}

const actions = {
  click,
  undo: () => state.clicks.length && undo(),
  reset: () => state.clicks.length && reset(),
  save: () => state.unsaved && save(),
  setPlanes,
  setWindow,
  chosenWindow: panel.chosenWindow,
  nextPreset,
  toggleMask,
  showHelp: () => element('help').showModal(),
};

/** Brings everything but the picture itself up to date. */
function render() {
  if (!state.viewer) return;
  const isOpen = Boolean(state.viewer.image);
  const canSave = state.unsaved && !waiting;
  element('empty').hidden = isOpen || waiting > 0;
  element('undo').disabled = element('reset').disabled = !state.clicks.length;
  element('save').disabled = !canSave;
  element('label').disabled = Boolean(model()) && !takesClicks(); // the model's labels have names
  element('segment').hidden = takesClicks() || !model();
  element('segment').disabled = !isOpen || waiting > 0;
  element('clicking').hidden = Boolean(model()) && !takesClicks();
  panel.showClicks(state.clicks, state.viewer);
  if (isOpen) panel.showLocation(state.viewer);
  else element('location').textContent = '';
}

function wire() {
  const on = (id, event, action) => element(id).addEventListener(event, action);
  on('image', 'change', ({ target }) => openImage(target.value));
  on('upload-button', 'click', () => element('upload').click());
  on('upload', 'change', ({ target }) => {
    if (target.files.length) upload(target.files[0]);
    target.value = '';
  });
  on('model', 'change', chooseModel);
  on('segment', 'click', segment);
  on('undo', 'click', undo);
  on('reset', 'click', reset);
  on('save-form', 'submit', (event) => {
    event.preventDefault();
    save();
  });
  on('preset', 'change', ({ target }) => setWindow(panel.PRESETS[target.value] ?? panel.chosenWindow()));
  for (const id of ['level', 'width']) on(id, 'change', () => setWindow(panel.chosenWindow()));
  on('opacity', 'input', ({ target }) => state.viewer?.setOpacity(target.value / 100));
  for (const button of document.querySelectorAll('[data-plane]')) {
    button.addEventListener('click', () => setPlanes(button.dataset.plane));
  }
  on('help-button', 'click', actions.showHelp);
  element('error').querySelector('button').addEventListener('click', () => panel.showError(''));
  listenDrop((file) => state.viewer && upload(file), panel.showError);
  window.addEventListener('beforeunload', (event) => state.unsaved && event.preventDefault());
  window.addEventListener('pagehide', () => state.session && forget(`/api/sessions/${state.session}`));
}

start();
