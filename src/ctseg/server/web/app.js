/** The annotation page: opens images, sends clicks in their order, shows the mask, saves it. */

import { bytes, forget, json } from './requests.js';
import { listen, listenDrop } from './controls.js';
import * as panel from './panel.js';
import { maskOf, openViewer } from './viewer.js';

const { element } = panel;
const GONE = [404, 440]; // what the server answers of a session that it does not have

const state = {
  viewer: null,
  models: [],
  model: '', // the name of the chosen one
  images: [],
  image: '', // the id of the open one
  session: null,
  clicks: [], // {shown, voxel, positive, isCounted, isLeaving}, also those on their way to the server
  whole: null, // {file, model}: the label map of an automatic model
  unsaved: false,
  generation: 0, // raised when what was being done is left: answers to it come too late then
};
let work = Promise.resolve();
let waiting = 0;

/**
 * Runs one task after the other, says what goes on, and tells what went wrong.
 *
 * The task gets a function: whether what it was begun for has been left. To be asked after each wait.
 */
function enqueue(text, task) {
  const { generation } = state;
  const isLeft = () => state.generation !== generation;
  waiting += 1;
  work = work.then(async () => {
    panel.showBusy(text);
    try {
      await task(isLeft);
    } catch (problem) {
      tell(problem, isLeft());
    }
    waiting -= 1;
    if (!waiting) panel.showBusy('');
    render();
  });
  return work;
}

function tell(problem, wasLeft) {
  const isGone = GONE.includes(problem.status) && problem.path.startsWith('/api/sessions/');
  if (isGone && wasLeft) return; // this page has ended that session itself
  if (problem.status !== undefined) panel.showError(problem.message);
  else panel.showError(`Something went wrong in this page: ${problem.message}`);
  if (isGone) forgetMask();
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
  state.generation += 1;
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
    element('canvas').dataset.image = '';
    const file = id && (await bytes('GET', `/api/images/${encodeURIComponent(id)}/file`));
    if (state.image !== id) return;
    if (id) await state.viewer.open(file, panel.chosenWindow());
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
  if (element('canvas').dataset.image !== image) return; // the picture is still that of another one
  const { name } = model();
  const one = { shown, voxel: state.viewer.voxel(shown), positive, isCounted: false, isLeaving: false };
  state.clicks.push(one);
  enqueue('Segmenting…', async (isLeft) => {
    if (isLeft()) return;
    try {
      const session = await openSession(image, name, isLeft);
      if (isLeft()) return;
      const body = { position: one.voxel, positive, coordinates: 'voxel' };
      const mask = await bytes('POST', `/api/sessions/${session}/clicks`, body);
      one.isCounted = true;
      await showMask(mask, isLeft);
    } catch (problem) {
      if (!one.isCounted) drop([one]);
      throw problem;
    }
  });
}

/** The session of what is open; one that comes too late is ended. */
async function openSession(image, name, isLeft) {
  if (state.session) return state.session;
  const { session } = await json('POST', '/api/sessions', { image, model: name });
  if (isLeft()) forget(`/api/sessions/${session}`);
  else state.session = session;
  return session;
}

function drop(clicks) {
  state.clicks = state.clicks.filter((one) => !clicks.includes(one));
}

/** Shows a mask that the server has made, unless what it is of was left in the meantime. */
async function showMask(file, isLeft) {
  const mask = await maskOf(file);
  if (isLeft()) return;
  state.viewer.setMask(mask);
  state.unsaved = true;
  panel.showStatus('');
  panel.showError('');
}

/** Takes back the last click that was there when this was called. */
function undo() {
  const one = state.clicks.filter(({ isLeaving }) => !isLeaving).pop();
  if (one) takeBack('Undoing…', 'undo', [one]);
}

/** Takes back the clicks that were there when this was called. */
function reset() {
  takeBack('Removing all clicks…', 'reset', [...state.clicks]);
}

/** Later clicks are sent after this one's answer, so that the server takes back the same ones. */
function takeBack(text, how, clicks) {
  for (const one of clicks) one.isLeaving = true;
  enqueue(text, async (isLeft) => {
    try {
      const counted = state.clicks.filter(({ isCounted }) => isCounted);
      const isSame = how === 'reset' || counted.at(-1) === clicks[0]; // not if that click has failed
      if (isLeft() || !counted.length || !isSame) return;
      const mask = await bytes('POST', `/api/sessions/${state.session}/${how}`);
      if (isLeft()) return;
      drop(clicks);
      if (state.clicks.some(({ isCounted }) => isCounted)) await showMask(mask, isLeft);
      else clearMask();
    } finally {
      for (const one of clicks) one.isLeaving = false;
    }
  });
}

function clearMask() {
  state.viewer.clearMask();
  state.unsaved = false;
}

function segment() {
  const { image } = state;
  const { name } = model();
  enqueue('Segmenting the image…', async (isLeft) => {
    if (isLeft()) return;
    const file = await bytes('POST', '/api/segment', { image, model: name });
    await showMask(file, isLeft);
    if (!isLeft()) state.whole = { file, model: name };
  });
}

function save() {
  if (state.whole) saveWhole();
  else if (state.session && element('save-form').reportValidity()) saveStructure(element('label').value.trim());
}

function saveStructure(label) {
  const { image } = state;
  enqueue('Saving…', async (isLeft) => {
    if (isLeft()) return;
    await json('POST', `/api/sessions/${state.session}/save`, { label, tag: 'final' });
    await saved(`Saved “${label}” in the final label of ${image}.`, isLeft);
  });
}

function saveWhole() {
  const { image, whole } = state;
  const isThere = state.images.some((one) => one.id === image && panel.hasFinal(one));
  if (isThere && !window.confirm('This image has a final label already. Put it aside and save this one?')) return;
  const form = new FormData();
  form.append('file', new Blob([whole.file]), 'label.nii.gz');
  enqueue('Saving…', async (isLeft) => {
    if (isLeft()) return;
    const path = `/api/images/${encodeURIComponent(image)}/labels/final?model=${encodeURIComponent(whole.model)}`;
    await json('PUT', path, form);
    await saved(`Saved the final label of ${image}.`, isLeft);
  });
}

async function saved(text, isLeft) {
  if (!isLeft()) state.unsaved = false;
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
