// What a page must not have, as lists of what was found; `test_site.py` runs this in the page.
document.head.append(Object.assign(document.createElement('style'), { textContent: '* { transition: none !important; }' }));
window.page = {
  images: () => [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 99)),

  figures: () => [...document.querySelectorAll('main img, main svg, main figure')].filter(e => !(
    e.matches('figure') ? e.querySelector('figcaption') : e.getAttribute('alt') || e.getAttribute('aria-label')
  )).map(e => e.outerHTML.slice(0, 99)),

  headings() {
    const levels = [...document.querySelectorAll('main :is(h1, h2, h3, h4, h5, h6)')].map(h => +h.tagName[1]);
    const found = levels.flatMap((level, i) => level > (levels[i - 1] ?? 0) + 1 ? [`h${level} after h${levels[i - 1]}`] : []);
    return levels.filter(level => level === 1).length === 1 ? found : [...found, 'not one h1'];
  },

  rawMath() {
    const main = document.querySelector('main').cloneNode(true);
    main.querySelectorAll('pre, code, math, svg').forEach(e => e.remove());
    return main.textContent.match(/.{0,20}(?:\$\$|\$[A-Za-z\\]|\\[\[(]|\\[a-z]+\{).{0,20}/g) ?? [];
  },

  // The entry of this page is in sight in the sidebar, and marked.
  active() {
    const link = document.querySelector('#quarto-sidebar .sidebar-link.active');
    if (!link) return document.title.startsWith('Page not found') ? [] : ['not marked'];
    const box = link.getBoundingClientRect();
    return box.height && box.top >= 0 && box.bottom <= innerHeight ? [] : ['out of sight'];
  },

  // Text with less contrast than 4.5 : 1 (3 : 1 if it is large).
  contrast() {
    document.querySelectorAll('details').forEach(e => e.open = true);
    const context = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }).getContext('2d', { willReadFrequently: true });
    const known = new Map();
    const rgba = color => {
      if (!known.has(color)) {
        context.clearRect(0, 0, 1, 1); context.fillStyle = color; context.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
        known.set(color, [r, g, b, a / 255]);
      }
      return known.get(color);
    };
    const over = ([r, g, b, a], [R, G, B]) => [a * r + (1 - a) * R, a * g + (1 - a) * G, a * b + (1 - a) * B, 1];
    const light = ([r, g, b]) => {
      const part = c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
      return .2126 * part(r) + .7152 * part(g) + .0722 * part(b);
    };
    const backgrounds = new Map([[null, [255, 255, 255, 1]]]);
    const background = e => {
      if (!backgrounds.has(e)) backgrounds.set(e, over(rgba(getComputedStyle(e).backgroundColor), background(e.parentElement)));
      return backgrounds.get(e);
    };
    const opacity = e => e ? getComputedStyle(e).opacity * opacity(e.parentElement) : 1;
    const found = new Map();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const times = new Map();  // of one kind of element a few are enough
    while (walker.nextNode()) {
      const e = walker.currentNode.parentElement;
      if (!walker.currentNode.data.trim() || e.matches('script, style, noscript, title, option')) continue;
      const what = `${e.tagName.toLowerCase()}.${e.className?.baseVal ?? e.className} in ${e.parentElement.tagName.toLowerCase()}.${e.parentElement.className}`;
      times.set(what, (times.get(what) ?? 0) + 1);
      if (times.get(what) > 9) continue;
      if (!e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
      const style = getComputedStyle(e), size = parseFloat(style.fontSize), ground = background(e);
      const [r, g, b, a] = rgba(e.closest('svg') ? style.fill : style.color);
      const ink = over([r, g, b, a * opacity(e)], ground);
      const [high, low] = [light(ink), light(ground)].sort((x, y) => y - x);
      const ratio = (high + .05) / (low + .05), large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
      if (ratio < (large ? 3 : 4.5) - .01 && !found.has(what)) found.set(what, `${what}: ${ratio.toFixed(2)} ${e.textContent.trim().slice(0, 30)}`);
    }
    return [...found.values()];
  },

  // What reaches beyond the page and cannot be scrolled to in a box of its own; on paper nothing scrolls.
  wide(paper = false) {
    const found = document.documentElement.scrollWidth > innerWidth + 1 ? [`the page scrolls: ${document.documentElement.scrollWidth}`] : [];
    const limit = paper ? document.querySelector('main').getBoundingClientRect().right : innerWidth;
    const scrolls = e => e && e.tagName !== 'MAIN' && (/auto|scroll/.test(getComputedStyle(e).overflowX) && !paper || scrolls(e.parentElement));
    for (const e of document.querySelectorAll('main *')) {
      if (e.closest('math, svg') && !e.matches('math, svg') || !e.checkVisibility()) continue;
      const box = e.getBoundingClientRect();
      if (box.width && box.right > limit + 1.5 && !scrolls(e.parentElement)) found.push(`${e.tagName}.${e.className} ${Math.round(box.right)} ${e.textContent.trim().slice(0, 30)}`);
    }
    return found.slice(0, 5);
  },
};
