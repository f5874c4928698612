/** Mouse and keyboard on the picture. */

const CLICK_PIXELS = 4; // a mouse that moved further was dragging
const NOTCH_PIXELS = 100; // of a wheel that tells pixels

/** Calls `viewer` and `actions` for what is done on `canvas`. */
export function listen(canvas, viewer, actions) {
  let press = null; // where the button went down: {x, y, button, at, dragged}
  let pointer = null; // the last place of the mouse over the picture
  let wheel = 0;

  canvas.addEventListener('contextmenu', (event) => event.preventDefault());

  canvas.addEventListener('pointerdown', (event) => {
    const at = viewer.at(event.clientX, event.clientY);
    canvas.focus({ preventScroll: true });
    if (!at) return;
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    press = { x: event.clientX, y: event.clientY, button: event.button, at, dragged: false, window: actions.chosenWindow() };
  });

  canvas.addEventListener('pointermove', (event) => {
    pointer = { x: event.clientX, y: event.clientY };
    if (!press) return;
    const [x, y] = [event.clientX - press.x, event.clientY - press.y];
    press.dragged ||= Math.hypot(x, y) > CLICK_PIXELS;
    if (!press.dragged) return;
    drag(event, x, y);
  });

  function drag(event, x, y) {
    if (press.button === 2) {
      const { level, width } = press.window;
      actions.setWindow({ level: Math.round(level - 2 * y), width: Math.max(1, Math.round(width + 2 * x)) });
    } else if (press.button === 1) {
      viewer.pan(press.at.plane, event.movementX, event.movementY);
    } else {
      const at = viewer.at(event.clientX, event.clientY);
      if (at?.plane === press.at.plane) viewer.moveTo(at.shown);
    }
  }

  canvas.addEventListener('pointerup', (event) => {
    if (press && !press.dragged && press.button !== 1) {
      const { shown } = press.at;
      const positive = press.button === 0 && !event.shiftKey;
      viewer.moveTo(shown);
      if (!event.ctrlKey && !event.metaKey) actions.click(shown, positive);
    }
    press = null;
  });
  canvas.addEventListener('pointercancel', () => { press = null; });

  canvas.addEventListener('wheel', (event) => {
    event.preventDefault();
    const at = viewer.at(event.clientX, event.clientY);
    if (!at) return;
    wheel += event.deltaMode ? Math.sign(event.deltaY) : event.deltaY / NOTCH_PIXELS;
    const notches = Math.trunc(wheel);
    wheel -= notches;
    if (!notches) return;
    if (event.ctrlKey) viewer.zoom(1.15 ** -notches, at.shown);
    else viewer.scroll(at.plane, -notches);
  }, { passive: false });

  const planeUnderMouse = () => (pointer && viewer.at(pointer.x, pointer.y)?.plane) ?? 0;

  /** What a key does; anything not here is the browser's. */
  const keys = {
    ArrowLeft: () => move(0, 1), // the patient's right is on the left
    ArrowRight: () => move(0, -1),
    ArrowUp: () => move(1, 1),
    ArrowDown: () => move(1, -1),
    PageUp: () => viewer.scroll(planeUnderMouse(), 1),
    PageDown: () => viewer.scroll(planeUnderMouse(), -1),
    Enter: (event) => actions.click(viewer.crosshair, !event.shiftKey),
    Delete: () => actions.reset(),
    '+': () => viewer.zoom(1.15),
    '-': () => viewer.zoom(1 / 1.15),
    0: () => viewer.fit(),
    1: () => actions.setPlanes('all'),
    2: () => actions.setPlanes('axial'),
    3: () => actions.setPlanes('coronal'),
    4: () => actions.setPlanes('sagittal'),
    w: () => actions.nextPreset(),
    m: () => actions.toggleMask(),
    '?': () => actions.showHelp(),
  };
  const withControl = { z: () => actions.undo(), s: () => actions.save() };

  function move(axis, step) {
    const shown = viewer.crosshair;
    shown[axis] += step;
    viewer.moveTo(shown);
  }

  document.addEventListener('keydown', (event) => {
    const control = event.ctrlKey || event.metaKey;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const action = control ? withControl[key] : keys[key];
    const isElsewhere = event.target !== canvas && event.target !== document.body && !(control && key === 's');
    if (!action || !viewer.image || isElsewhere || event.altKey || document.querySelector('dialog[open]')) return;
    event.preventDefault();
    action(event);
  });
}

/** Calls `take` with a file that is dropped anywhere, or `refuse` with what to do instead. */
export function listenDrop(take, refuse) {
  const veil = document.getElementById('drop');
  window.addEventListener('dragover', (event) => {
    event.preventDefault();
    veil.hidden = false;
  });
  window.addEventListener('dragleave', (event) => {
    if (!event.relatedTarget) veil.hidden = true;
  });
  window.addEventListener('drop', (event) => {
    event.preventDefault();
    veil.hidden = true;
    const files = [...event.dataTransfer.files];
    if (files.length === 1) take(files[0]);
    else refuse('Drop one NIfTI or NRRD file at a time.');
  });
}
