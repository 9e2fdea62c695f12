// Search runs in a worker, and browsers start none for a page that was opened as a file. There, a hidden frame does
// its work.
if (location.protocol == "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    this.frame = Object.assign(document.createElement("iframe"), {hidden: true});
    document.body.append(this.frame);
    this.inside = this.frame.contentWindow;
    this.inside.document.open();
    this.inside.document.write("<!doctype html><body>");
    this.inside.document.close();
    this.inside.postMessage = data => setTimeout(() => this.onmessage?.({data}));
    const script = Object.assign(this.inside.document.createElement("script"), {src: url});
    this.ready = new Promise(done => script.onload = done);
    this.inside.document.body.append(script);
  }
  postMessage(data) { this.ready.then(() => this.inside.onmessage?.({data})); }
  terminate() { this.frame.remove(); }
};
