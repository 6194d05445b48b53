// Browsers refuse workers to pages opened as files: run the worker of the search in a hidden frame instead.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.loaded = new Promise((resolve) => this.frame.addEventListener("load", resolve))
      this.frame.receive = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.frame.srcdoc = `<script>postMessage = frameElement.receive</script><script src="${url}"></script>`
      document.body.append(this.frame)
    }
    postMessage(data) {
      this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
